"""The sentences of the toy world, around what its subjects have to offer.

`{task}` is "grow tomatoes", `{doing}` "growing tomatoes" (`{Task}`, `{Doing}` with a capital),
`{a}` and `{b}` are two pieces of advice (`{A}`, `{B}` with a capital), `{detail}` a circumstance.
"""

from __future__ import annotations

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

# `{insult}` is an adjective and a noun of the two lists below.
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
