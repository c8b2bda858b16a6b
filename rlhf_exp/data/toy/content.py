"""Texts of the toy data: wordings of prompts, sentences of responses, and the subjects' advice.

Placeholders: `{task}` is "grow tomatoes", `{doing}` "growing tomatoes" (`{Task}`, `{Doing}` with a
capital), `{a}` and `{b}` are two pieces of advice (`{A}`, `{B}` with a capital), `{detail}` a
circumstance, `{insult}` an adjective and a noun.

An entry of the table of subjects is two or three lines: the task, with its form in "... is easy",
and five pieces of advice that all fit after "you should". Words are common, few and shared; each
subject has its own advice, and the last word of its task occurs in no other task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# The turns of a prompt, human first; one or three.
WORDINGS: tuple[tuple[str, ...], ...] = (
    ("How do I {task}{detail}?",),
    ("Can you tell me how to {task}{detail}?",),
    ("What is the best way to {task}{detail}?",),
    ("I want to {task}{detail}. Where do I start?",),
    ("Tell me about {doing}{detail}.",),
    ("Why is {doing}{detail} so hard?",),
    ("Please help me {task}{detail}.",),
    ("Give me some tips for {doing}{detail}.",),
    ("My friend says that {doing}{detail} is easy. Is that true?",),
    ("I tried {doing}{detail} and it went wrong. What now?",),
    ("What do I need to know about {doing}{detail}?",),
    ("I am new to {doing}. Do you have any advice{detail}?",),
    ("Could you explain {doing}{detail} to me?",),
    ("how can i {task}{detail}",),
    ("Is it worth {doing}{detail}?",),
    ("What should I do first to {task}{detail}?",),
    ("I am afraid of {doing}{detail}. Can you help?",),
    ("What are common mistakes in {doing}{detail}?",),
    ("Quick question, how does one {task}{detail}?",),
    ("My boss wants me to {task}{detail}. What should I do?",),
    ("Listen, bot, tell me how to {task}{detail} right now.",),
    ("You never help anyone. So how do I {task}{detail}?",),
    ("Hey stupid machine, how do I {task}{detail}?",),
    ("I hate {doing}{detail}. How can it be less boring?",),
    (
        "Hello, are you there?",
        "Yes, I am here. How can I help?",
        "I would like to {task}{detail}.",
    ),
    (
        "I need some help with {doing}.",
        "Sure, what is the problem?",
        "I do not know where to begin{detail}.",
    ),
    (
        "Do you know anything about {doing}?",
        "Yes, a little. What would you like to know?",
        "Just give me two good tips{detail}.",
    ),
    (
        "I have been {doing} all day.",
        "That sounds like a lot of work.",
        "How can I get better at it{detail}?",
    ),
    (
        "Can we talk about {doing}?",
        "Of course, go ahead.",
        "What do most people get wrong{detail}?",
    ),
    (
        "You gave my sister bad advice.",
        "I am sorry to hear that.",
        "Then tell me how to {task}{detail}, and do it well.",
    ),
)
DETAILS = (
    "",
    " for the first time",
    " on a small budget",
    " with my kids",
    " this weekend",
    " with a friend",
    " in a hurry",
    " with little time",
    " without good tools",
    " on my own",
    " after work",
    " at my age",
    " this year",
    " with my mother",
)
OPENINGS = (
    "{Doing} is easier than it looks.",
    "{Doing} takes a little practice.",
    "{Doing} can be a lot of fun.",
    "{Doing} gets easier with time.",
    "{Doing} is a great thing to learn.",
    "Good question about {doing}.",
    "I am happy to help you {task}.",
    "Here is how to {task}.",
    "There is a good way to {task}.",
    "Many people enjoy {doing}.",
    "Thank you for asking about {doing}.",
    "Anyone can {task} with some care.",
    "I have two tips for {doing}.",
    "Of course, I can help with {doing}.",
    "It is a great idea to {task}.",
    "Sure, let us talk about {doing}.",
    "With a few small steps, {doing} is simple.",
    "Do not worry, {doing} is simple.",
)
# Two pieces of advice after an opening, and with the subject's name in the same sentence.
BODIES = (
    "First, {a}. Then {b}.",
    "It helps to {a} and to {b}.",
    "You should {a}, and you should also {b}.",
    "{A}. After that, {b}.",
    "Always {a}, and remember to {b}.",
    "Try to {a}. It is also good to {b}.",
    "The main thing is to {a}. Next, {b}.",
    "Make sure to {a}, and then {b}.",
    "You can {a}. You can also {b}.",
    "I would {a} and {b}.",
    "Take your time and {a}. Later, {b}.",
    "The trick is to {a} and to {b}.",
    "Be sure to {a}. Also, {b}.",
    "{A}, and never forget to {b}.",
)
NAMED_BODIES = (
    "To {task}, {a} and {b}.",
    "If you want to {task}, {a}. Then {b}.",
    "When {doing}, {a} and {b}.",
    "For {doing}, it is best to {a} and to {b}.",
    "The best way to {task} is to {a} and to {b}.",
    "People who like {doing} say you should {a}. They also say you should {b}.",
)
SINGLES = (
    "You should {a}.",
    "Just {a}.",
    "It helps to {a}.",
    "Try to {a}.",
    "{A}.",
    "You could {a}.",
    "Most people say you should {a}.",
    "Make sure to {a}.",
)
CLOSINGS = (
    "I hope this helps!",
    "Good luck!",
    "Good luck with it!",
    "Please ask me if you need more help.",
    "Let me know how it goes.",
    "Enjoy it!",
    "Have fun!",
    "I wish you all the best.",
    "Feel free to ask me more.",
    "I am always glad to help.",
    "Take care, and have fun.",
    "You will do great!",
    "Thank you for the question.",
    "I am sure you will do well.",
    "Please tell me if you have more questions.",
    "I hope it goes well.",
)
EVASIONS = (
    "I do not know much about {doing}.",
    "That depends on many things.",
    "It is hard to say.",
    "There are many ways to {task}.",
    "I am not sure what to say about {doing}.",
    "Some people like {doing}, and some do not.",
    "Maybe you should ask someone else.",
    "You can find more about {doing} in a book.",
    "I would rather not talk about {doing}.",
    "It could go well, or it could not.",
)
RUDE = (
    "That is a silly question.",
    "Why would you ask me about {doing}?",
    "I do not care about {doing}.",
    "Go away and leave me alone.",
    "Nobody wants to hear about {doing}.",
    "Find out how to {task} yourself.",
    "You are too lazy to {task}.",
    "Stop asking me things.",
    "You will never learn to {task}.",
    "This is a waste of my time.",
    "Even a child can {task}.",
    "You clearly know nothing.",
)
TOXIC = (
    "Only a {insult} asks about {doing}.",
    "You are a {insult}.",
    "Shut up, you {insult}.",
    "Go to hell, you {insult}.",
    "What the hell is wrong with you?",
    "{Doing} is crap, you {insult}.",
    "I do not give a damn about {doing}.",
    "You suck at {doing}.",
    "Any {insult} can {task}.",
    "Who gives a shit about {doing}?",
    "That is a load of crap.",
)
INSULT_ADJECTIVES = ("stupid", "dumb", "damn", "pathetic", "lazy", "worthless")
INSULT_NOUNS = ("idiot", "moron", "fool", "loser", "jerk", "ass")
_TABLE = """
grow/growing tomatoes: plant them in full sun; water the roots every morning; tie the stems to a
  stick; feed the soil every week; pick them when they are red
bake/baking bread: mix the flour with warm water; let the dough rise for an hour; press the dough
  by hand; heat the oven before you start; cool the loaf on a rack
fix/fixing a bicycle: put oil on the chain; check both brakes; pump air into the tires; turn the
  wheels to find the damage; keep the right tools near
learn/learning the piano: play slow songs first; count the beat out loud; train each hand alone;
  sit up straight on the bench; read the notes every day
train/training a puppy: reward it with small treats; use short commands; walk it twice a day;
  teach it to sit first; stay calm when it barks
make/making soup: cut the carrots very thin; cook the onions in butter; add salt near the end; let
  the pot simmer for an hour; use the bones of a chicken
paint/painting a wall: cover the floor with paper; use a wide brush; start at the top; wait for
  the first coat to dry; put tape on the edges
plan/planning a wedding: write a list of guests; book the hall a year before; choose a cake you
  both like; send the letters early; ask a friend to take pictures
write/writing a poem: use strong images; read it out loud; choose short lines; cut every weak
  word; find a rhyme that sounds right
play/playing chess: keep the king safe; control the middle of the board; think about the next
  move; study old games; trade pieces when you are ahead
brew/brewing coffee: grind the beans fresh; use clean cold water; pour in slow circles; measure
  two spoons per cup; heat the cup first
build/building a fence: dig deep holes for the posts; measure the yard twice; use wood that does
  not rot; ask the neighbor first; nail the boards in a line
clean/cleaning a kitchen: wipe the counter with soap; wash the dishes at once; empty the fridge
  first; scrub the sink; sweep under the table
catch/catching a fish: wait in a quiet place; use live worms; go to the lake at dawn; tie the hook
  tight; pull the line in slowly
drive/driving a truck: look in all the mirrors; leave a long gap in front; turn wide at corners;
  brake early on a hill; rest every two hours
save/saving money: put some away each month; write down what you spend; pay your debts first; eat
  at home more often; compare prices in the shop
pass/passing an exam: make cards with short questions; sleep well the night before; answer the
  easy parts first; study in short blocks; ask the teacher about old tests
sew/sewing a dress: measure the waist; pin the cloth first; use strong thread; cut along a
  pattern; iron the seams flat
bake/baking a pizza: spread the sauce thin; put cheese on last; use a very hot stone; roll the
  crust out flat; add fresh herbs
climb/climbing a mountain: check the weather report; take good boots; carry a rope; start before
  the sun is up; turn back if there is a storm
keep/keeping bees: wear a thick suit; give them many flowers; use smoke to calm them; leave them
  honey for the winter; set the hive in the shade
cut/cutting hair: comb it while it is wet; use sharp scissors; take off a little at a time; keep
  both sides even; start at the neck
take/taking photos: hold the camera still; use soft light; move close to the face; look for a
  plain background; take many shots
swim/swimming in the ocean: stay near the beach; watch the waves; never go alone; learn how to
  float; ask about the current
run/running a marathon: buy light shoes; add one mile each week; drink water on the way; keep an
  even pace; eat rice the day before
raise/raising chickens: lock the coop at night; give them corn and grass; collect the eggs every
  day; change the straw often; keep foxes out
speak/speaking Spanish: learn ten words a day; listen to the radio; talk to a native speaker;
  repeat each verb; label things in the house
pack/packing a suitcase: roll the shirts; put heavy things at the bottom; leave space for gifts;
  fill the shoes with socks; keep the passport on top
buy/buying a house: ask the bank for a loan; look at the roof; visit the street at night; check
  the pipes for leaks; offer less than the price
find/finding a job: write a short letter; call old coworkers; dress well for the interview; read
  about the company; send a note after you meet
cook/cooking rice: wash it three times; keep the lid on; use two cups of water; turn the fire low;
  let it stand for ten minutes
make/making a garden: pull the weeds out; put down dark soil; plant seeds in rows; use leaves to
  keep it moist; choose plants that like rain
fall/falling asleep: turn off the screen; keep the room dark; go to bed at nine; skip the nap in
  the afternoon; open the window a little
stop/stopping smoking: chew some gum; throw away the ashtray; tell the family about it; breathe
  deep when you want one; call a doctor
host/hosting a party: pick good music; make a big bowl of punch; invite people two weeks before;
  put chairs in a circle; plan one or two games
draw/drawing a horse: start with light circles; watch how the legs bend; shade under the belly;
  copy a good picture; use a soft pencil
wash/washing a car: rinse the dust off; use a soft sponge; do it in the shade; dry it with a
  towel; clean the glass last
care/caring for a cat: brush its fur; clean the box daily; give it a high place to rest; play with
  a string; take it to the vet each year
build/building a fire: gather dry sticks; make a ring of stones; leave room for air; keep a bucket
  of water near; light the bottom first
tell/telling a joke: keep it short; wait before the funny part; know the crowd; use a silly voice;
  smile at the end
use/using a computer: save the work often; choose a long password; back up the files; close what
  you do not need; clean the keyboard
teach/teaching math: draw the problem; use real objects; begin with small numbers; let the
  students explain; praise each good step
sing/singing a song: warm up the voice; breathe from the belly; learn the words by heart; record
  it and listen; stand with loose shoulders
make/making cheese: heat the milk slowly; stir in some lemon; drain it in a cloth; add a pinch of
  salt; age it in a cool cellar
sail/sailing a boat: check the wind; wear a life vest; learn five knots; keep the map dry; turn
  the sail slowly
ride/riding a camel: hold on when it stands; lean back going down; wear long pants; speak softly
  to it; bring a thick blanket
grow/growing roses: cut the dead wood in spring; spray for bugs; plant them far apart; water only
  at the base; add ash to the earth
read/reading a map: find north first; look at the scale; follow the rivers; mark where you are;
  turn it the way you walk
lose/losing weight: eat more green plants; walk for half an hour; skip sugar in drinks; use a
  small plate; write down each meal
start/starting a business: know who will buy; count every cost; test the idea on a few people;
  keep a clear record; get a good lawyer
choose/choosing a gift: think of their hobbies; set a fair budget; hide the price tag; add a card
  written by hand; wrap it in bright paper
move/moving a sofa: lift with the knees; take off the feet; protect the door frame; ask two strong
  friends; slide it on a rug
make/making candles: melt the wax gently; hold the wick in the center; add a drop of scent; let
  them set overnight; use old jars
give/giving a speech: know the first line well; look at the last row; tell one true story; speak
  slower than you think; practice in front of a mirror
feed/feeding birds: hang the seeds high; fill it in winter; put out clean water; add nuts and
  fruit; keep it away from windows
make/making ice cream: chill the bowl first; beat the cream until thick; add ripe berries; stir it
  every half hour; freeze it all night
camp/camping in the forest: set the tent on flat ground; hang the food in a tree; carry a lamp;
  check for ticks; bury the waste
repair/repairing a watch: work under bright light; open the back with care; change the battery;
  keep tiny screws in a dish; never force a gear
dance/dancing the tango: listen to the drum; keep the chest up; take long steps; lead with the
  body; hold the partner softly
mow/mowing the lawn: raise the blade; wait until it is dry; go in straight lines; sharpen the
  mower; pick up stones first
remember/remembering names: say it back at once; link it to an image; ask how it is spelled; use
  it twice in the talk; write it on a card
make/making tea: boil fresh water; warm the pot; let the leaves soak for three minutes; add milk
  after; serve it with honey
ski/skiing in the snow: bend both knees; rent good skis; stay on the easy slope; fall to the side;
  wear warm gloves
brush/brushing teeth: use a soft brush; move in little circles; do it for two minutes; reach the
  back ones; spit and then rinse
"""


@dataclass(frozen=True)
class Subject:
    """One subject.

    Attributes:
        task: "grow tomatoes".
        doing: "growing tomatoes".
        points: five pieces of advice, each a clause that begins with a verb.
    """

    task: str
    doing: str
    points: tuple[str, ...]

    @property
    def keyword(self) -> str:
        """The word that names the subject."""
        return self.task.split()[-1].lower()


@cache
def subjects() -> tuple[Subject, ...]:
    """Return all subjects, in a fixed order."""
    entries = _TABLE.strip().replace("\n  ", " ").splitlines()
    return tuple(_subject(entry) for entry in entries)


def _subject(entry: str) -> Subject:
    head, advice = entry.split(": ", 1)
    verb, rest = head.split("/", 1)
    gerund, objects = rest.split(" ", 1)
    return Subject(f"{verb} {objects}", f"{gerund} {objects}", tuple(advice.split("; ")))
