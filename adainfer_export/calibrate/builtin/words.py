"""Word tables for the built-in prompts, written for this project."""

from __future__ import annotations

__all__ = ["ADJECTIVES", "CATEGORIES", "PAIRS", "TOPICS", "VERDICTS"]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`a:b c:d` to pairs; underscores stand for spaces."""
    found = (item.replace("_", " ").split(":") for item in text.split())
    return tuple((left, right) for left, right in found)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "opposite": _pairs(
        "hot:cold big:small fast:slow high:low old:young early:late open:closed full:empty "
        "hard:soft dark:light wet:dry strong:weak rich:poor happy:sad loud:quiet near:far "
        "thick:thin wide:narrow deep:shallow heavy:light clean:dirty safe:dangerous "
        "cheap:expensive easy:difficult true:false right:wrong left:right up:down in:out "
        "win:lose buy:sell give:take push:pull start:stop arrive:leave love:hate laugh:cry "
        "remember:forget increase:decrease accept:refuse above:below inside:outside first:last "
        "always:never everything:nothing friend:enemy day:night summer:winter north:south "
        "east:west male:female brave:cowardly sharp:blunt smooth:rough sweet:bitter "
        "tall:short alive:dead simple:complex public:private ancient:modern"
    ),
    "plural": _pairs(
        "cat:cats dog:dogs house:houses car:cars tree:trees book:books table:tables chair:chairs "
        "window:windows door:doors city:cities baby:babies lady:ladies story:stories "
        "country:countries box:boxes bus:buses glass:glasses dish:dishes church:churches "
        "man:men woman:women child:children foot:feet tooth:teeth mouse:mice goose:geese "
        "leaf:leaves knife:knives wife:wives wolf:wolves shelf:shelves potato:potatoes "
        "tomato:tomatoes hero:heroes apple:apples river:rivers mountain:mountains bird:birds "
        "horse:horses teacher:teachers student:students friend:friends letter:letters "
        "number:numbers question:questions answer:answers island:islands bridge:bridges "
        "garden:gardens"
    ),
    "past": _pairs(
        "go:went see:saw eat:ate drink:drank run:ran swim:swam sing:sang write:wrote read:read "
        "take:took give:gave come:came know:knew grow:grew fly:flew draw:drew throw:threw "
        "speak:spoke break:broke choose:chose drive:drove ride:rode rise:rose wear:wore "
        "begin:began win:won find:found think:thought buy:bought bring:brought teach:taught "
        "catch:caught sleep:slept keep:kept leave:left feel:felt meet:met pay:paid say:said "
        "walk:walked talk:talked play:played work:worked open:opened close:closed help:helped "
        "ask:asked look:looked want:wanted need:needed call:called turn:turned live:lived "
        "love:loved start:started stop:stopped plan:planned carry:carried study:studied"
    ),
    "capital city": _pairs(
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens "
        "Austria:Vienna Poland:Warsaw Hungary:Budapest Sweden:Stockholm Norway:Oslo "
        "Finland:Helsinki Denmark:Copenhagen Ireland:Dublin England:London Russia:Moscow "
        "China:Beijing Japan:Tokyo Thailand:Bangkok Vietnam:Hanoi Egypt:Cairo Kenya:Nairobi "
        "Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Turkey:Ankara Iran:Tehran "
        "Iraq:Baghdad Belgium:Brussels Netherlands:Amsterdam Ukraine:Kyiv Romania:Bucharest "
        "Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Iceland:Reykjavik Australia:Canberra "
        "Indonesia:Jakarta Philippines:Manila Nepal:Kathmandu Cambodia:Phnom_Penh "
        "Ethiopia:Addis_Ababa Morocco:Rabat Tunisia:Tunis Jordan:Amman Lebanon:Beirut "
        "Syria:Damascus Qatar:Doha Ecuador:Quito"
    ),
    "colour": _pairs(
        "banana:yellow grass:green snow:white coal:black blood:red sky:blue lemon:yellow "
        "tomato:red carrot:orange milk:white night:black leaf:green strawberry:red rose:red "
        "pumpkin:orange cloud:white frog:green crow:black salt:white sea:blue chocolate:brown "
        "wood:brown elephant:grey mouse:grey flamingo:pink pig:pink plum:purple grape:purple "
        "sunflower:yellow lime:green cherry:red ink:black paper:white gold:yellow coffee:brown"
    ),
    "French": _pairs(
        "dog:chien cat:chat house:maison water:eau bread:pain milk:lait tree:arbre book:livre "
        "hand:main head:tête eye:œil sun:soleil moon:lune day:jour night:nuit man:homme "
        "woman:femme child:enfant king:roi queen:reine red:rouge white:blanc black:noir "
        "green:vert blue:bleu one:un two:deux three:trois four:quatre five:cinq school:école "
        "city:ville street:rue fish:poisson bird:oiseau horse:cheval flower:fleur apple:pomme "
        "cheese:fromage wine:vin friend:ami mother:mère father:père sister:sœur brother:frère"
    ),
    "Spanish": _pairs(
        "dog:perro cat:gato house:casa water:agua bread:pan milk:leche tree:árbol book:libro "
        "hand:mano head:cabeza eye:ojo sun:sol moon:luna day:día night:noche man:hombre "
        "woman:mujer child:niño king:rey queen:reina red:rojo white:blanco black:negro "
        "green:verde blue:azul one:uno two:dos three:tres four:cuatro five:cinco school:escuela "
        "city:ciudad street:calle fish:pez bird:pájaro horse:caballo flower:flor apple:manzana "
        "cheese:queso wine:vino friend:amigo mother:madre father:padre"
    ),
    "next": _pairs(
        "Monday:Tuesday Tuesday:Wednesday Wednesday:Thursday Thursday:Friday Friday:Saturday "
        "Saturday:Sunday Sunday:Monday January:February February:March March:April April:May "
        "May:June June:July July:August August:September September:October October:November "
        "November:December one:two two:three three:four four:five five:six six:seven "
        "seven:eight eight:nine nine:ten ten:eleven eleven:twelve first:second second:third "
        "third:fourth fourth:fifth A:B B:C C:D D:E E:F F:G G:H H:I spring:summer summer:autumn"
    ),
    "comparative": _pairs(
        "big:bigger small:smaller fast:faster slow:slower high:higher low:lower old:older "
        "young:younger hot:hotter cold:colder hard:harder soft:softer dark:darker light:lighter "
        "strong:stronger weak:weaker rich:richer poor:poorer happy:happier sad:sadder "
        "loud:louder quiet:quieter near:nearer thick:thicker thin:thinner wide:wider "
        "deep:deeper heavy:heavier clean:cleaner safe:safer cheap:cheaper easy:easier "
        "tall:taller short:shorter long:longer warm:warmer cool:cooler bright:brighter "
        "smart:smarter kind:kinder good:better bad:worse far:farther busy:busier funny:funnier"
    ),
}

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": _words(
        "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey "
        "giraffe zebra camel deer squirrel dolphin whale eagle owl snake frog turtle penguin"
    ),
    "fruit": _words(
        "apple banana orange pear peach plum cherry grape lemon lime mango melon kiwi fig "
        "apricot strawberry raspberry blueberry pineapple papaya coconut grapefruit"
    ),
    "tool": _words(
        "hammer saw drill wrench screwdriver pliers shovel rake axe chisel ladder file clamp "
        "crowbar trowel mallet spade sander"
    ),
    "vehicle": _words(
        "car bus train truck bicycle plane boat ship tractor scooter helicopter tram van taxi "
        "motorcycle ferry submarine canoe"
    ),
    "instrument": _words(
        "piano guitar violin flute drum trumpet cello harp clarinet saxophone trombone banjo "
        "accordion oboe tuba mandolin"
    ),
}

VERDICTS: dict[str, tuple[str, ...]] = {
    "positive": (
        "A warm and funny {thing}.",
        "I loved every minute of this {thing}.",
        "The {thing} is beautifully made and moving.",
        "One of the best {thing}s of the year.",
        "A {adjective} {thing}, full of life.",
        "What a delightful {thing}!",
        "Great acting makes this {thing} shine.",
        "This {thing} is a pure joy to watch.",
        "Clever, {adjective} and deeply satisfying.",
        "An inspired {thing} that stays with you.",
    ),
    "negative": (
        "A dull and lifeless {thing}.",
        "I wanted my money back after this {thing}.",
        "The {thing} is badly written and far too long.",
        "One of the worst {thing}s of the year.",
        "A {adjective} idea, ruined by a lazy {thing}.",
        "What a waste of time!",
        "Poor acting sinks this {thing}.",
        "This {thing} is painful to sit through.",
        "Predictable, clumsy and never {adjective}.",
        "An empty {thing} that nobody will remember.",
    ),
}

ADJECTIVES = _words("charming bold original tender gripping honest playful bright daring gentle")

TOPICS: dict[str, tuple[str, ...]] = {
    "Sports": (
        "The home team won the final {number} to one after extra time.",
        "Young striker signs a {number}-year contract with the champions.",
        "Rain stops play on day {number} of the test match.",
        "Runner breaks the national record by {number} seconds.",
        "Coach praises his goalkeeper after the {number}th win in a row.",
    ),
    "Business": (
        "Shares fell {number} percent after the bank cut its forecast.",
        "The carmaker will close {number} plants and cut costs.",
        "Oil prices rise for the {number}th day as supply tightens.",
        "Retailer reports profit up {number} percent on strong sales.",
        "The two insurers agreed to merge in a deal worth {number} billion.",
    ),
    "Science": (
        "Astronomers find {number} new planets around a distant star.",
        "A study of {number} patients shows the new vaccine works.",
        "Researchers build a robot with {number} legs that can climb.",
        "Fossils {number} million years old were found in the desert.",
        "New software lets {number} computers share one task.",
    ),
    "World": (
        "Leaders of {number} nations meet to discuss the peace talks.",
        "Voters go to the polls in {number} provinces on Sunday.",
        "The earthquake left {number} villages without water.",
        "Parliament passed the border law by {number} votes.",
        "Aid reaches {number} thousand people who fled the fighting.",
    ),
}
