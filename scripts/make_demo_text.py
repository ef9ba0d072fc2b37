#!/usr/bin/env python3
"""Generates the training text of the bundled demo model: seeded, from templates, without any outside data.

Writes one document per line as a JSON string. The markers <|im_start|>, <|im_end|> and <|endoftext|> in it are
control tokens for scripts/train_demo_model.py. The kinds of document and their shares are in KINDS at the end
of the file. Everything the model can be asked comes from the tables here: what is not in them, it does not know.

    make_demo_text.py --docs 200000 --seed 1 -o /tmp/demo_text.jsonl
    make_demo_text.py --docs 20 --seed 7            # a look at it
"""

import argparse
import json
import random
import sys

# --------------------------------------------------------------------------------------------------------------
# Word tables.

GIRLS = """Lily Anna Mia Rosie Daisy Ella Lucy Emma Nina Ruby Molly Bella Sophie Clara Grace Holly Ivy Poppy Zoe
Luna Hazel Stella Maya Nora Alice Emily Kate Sara Tilly Penny Olive Maria Julia Eva Ada Amy Betty Cora Dora Elsa
Flora Greta Hanna Ida June Kira Lena Mabel Nelly Polly Rita Sally Tess Una Vera Wendy Willow Pearl Jane Mary""".split()
BOYS = """Tom Max Ben Sam Leo Oscar Felix Toby Jack Finn Charlie Teddy Otto Hugo Milo Henry George Oliver Noah Peter
Bruno Rusty Barney Archie Rex Louis Theo Simon Tim Bob Jim Paul Fred Carl Dan Eddy Frank Gus Harry Ivan Jonas Karl
Lars Mike Ned Olaf Pip Ralph Sid Ted Victor Walter Bert Alfie Arthur Edgar Dexter Monty Jasper Alex""".split()
SYLLABLES = "ba be bo da di do fa fi ga go ka ki ko la le lo ma mi mo na ne no pa pi ra ri ro sa so ta ti to va vi za zu".split()
ANIMALS = """fox rabbit bear cat dog mouse owl hedgehog squirrel deer wolf frog duck goat pig cow horse lamb hen bird
turtle elephant lion tiger monkey giraffe zebra penguin seal whale dolphin otter beaver badger mole bat bee ant
butterfly snail crab fish panda koala kangaroo camel donkey goose swan robin sparrow parrot kitten puppy dragon
hamster raccoon moose lizard spider ladybug""".split()
ADJECTIVES = """little small brave kind clever happy shy curious gentle cheerful quiet funny friendly young sleepy old
hungry lonely lazy proud red white grey brown tiny silly""".split()
PLACES = ["in a green forest", "near a small river", "on a quiet farm", "by the sea", "at the foot of a tall mountain",
          "in a cosy house under an old oak tree", "at the edge of a wide meadow", "in a warm valley",
          "beside a blue lake", "in a little village", "on a sunny hill", "in a garden full of flowers",
          "next to an old mill", "in a house with a red door"]
HOBBIES = ["sing", "run in the grass", "look at the stars", "pick berries", "play in the rain", "read books",
           "swim in the pond", "climb the hill", "collect shiny stones", "listen to the wind", "draw pictures",
           "dance in the sun", "bake little cakes", "count the clouds", "jump over puddles", "make up songs"]
THINGS = ["red ball", "blue scarf", "golden key", "silver bell", "warm hat", "favourite book", "little drum",
          "wooden boat", "yellow kite", "shiny button", "old map", "paper crown", "green umbrella", "soft blanket"]
FOODS = ["apple", "pear", "cookie", "carrot", "cake", "berry pie", "sandwich", "loaf of bread", "bowl of soup",
         "piece of cheese"]
SPOTS = ["under the old bridge", "behind a big rock", "in the tall grass", "under a bush", "next to the pond",
         "on top of the hill", "inside a hollow log", "at the end of the path", "under a pile of leaves"]
FEELINGS = ["happy", "proud", "glad", "very happy", "full of joy"]
LESSONS = ["that good friends always help each other", "that it is fine to ask for help",
           "that being kind makes everyone happy", "that sharing makes things better",
           "that you should never give up", "that even small animals can do big things",
           "that a little courage goes a long way", "that it is good to listen to others"]


def article(words):
    """The noun phrase with a or an in front."""
    return ("an " if words[0] in "aeiou" and not words.startswith(("one", "uni")) else "a ") + words


class Hero:
    """A name with the pronouns that go with it."""

    def __init__(self, r, other=None):
        while True:
            if r.random() < 0.2:
                self.name = "".join(r.choice(SYLLABLES) for _ in range(r.choice((2, 2, 3)))).capitalize()
                self.she = r.random() < 0.5
            else:
                self.she = r.random() < 0.5
                self.name = r.choice(GIRLS if self.she else BOYS)
            if other is None or other.name != self.name:
                break
        self.animal = r.choice(ANIMALS)
        while other is not None and other.animal == self.animal:
            self.animal = r.choice(ANIMALS)
        if r.random() < 0.07:
            self.animal = "girl" if self.she else "boy"
        self.he, self.him, self.his = ("she", "her", "her") if self.she else ("he", "him", "his")
        self.He, self.His = self.he.capitalize(), self.his.capitalize()


# --------------------------------------------------------------------------------------------------------------
# Stories: an opening, one of the plots, an ending.

PLOTS = {
    "lost": [
        ["One day, {n} lost {his} {thing}.", "One morning, {n} could not find {his} {thing}."],
        ["{He} looked everywhere, but it was gone.", "{He} looked in the house and in the garden, but it was not there."],
        ["{n} felt very sad.", "{n} sat down and began to cry."],
        ["Then {article_m} named {m} came by and asked, \"What is wrong?\"",
         "{article_M} named {m} saw {him} and asked, \"Why are you sad?\""],
        ["\"I lost my {thing},\" said {n}.", "\"I cannot find my {thing},\" {n} said."],
        ["\"Do not worry,\" said {m}. \"I will help you.\"", "\"Let us look together,\" said {m}."],
        ["They looked for a long time. At last they found it {spot}.", "They searched all day, and in the end {m} found it {spot}."],
        ["{n} gave {m} a big hug.", "\"Thank you, {m}!\" said {n}."],
    ],
    "storm": [
        ["One day, dark clouds came and it began to rain.", "One evening, a big storm came over the hills."],
        ["The wind was loud and {n} was afraid.", "The thunder was so loud that {n} began to shake."],
        ["{n} ran as fast as {he} could and looked for a dry place.", "{He} was wet and cold and far from home."],
        ["Then {he} saw a light in a small window. It was the home of {article_m} named {m}.",
         "Then {he} heard a voice. \"Come in!\" said {article_m} named {m}."],
        ["{m} gave {him} a warm blanket and a cup of hot tea.", "{m} made a fire and gave {him} some soup."],
        ["They told each other stories until the storm was over.", "They played games until the rain stopped."],
        ["When the sun came out, they saw a rainbow in the sky.", "In the morning the sky was blue again."],
    ],
    "friend": [
        ["{n} had no friends and often felt alone.", "But {n} had nobody to play with."],
        ["One day, {he} met {article_m} named {m}.", "One sunny day, {article_m} named {m} came to live nearby."],
        ["{n} was too shy to speak.", "At first {n} hid behind a tree."],
        ["But {m} smiled and said, \"Hello! Do you want to play?\"", "\"Hello,\" said {m}. \"Will you be my friend?\""],
        ["\"Yes, please!\" said {n}.", "{n} smiled and said, \"Yes, I would love to!\""],
        ["They played all day and laughed a lot.", "They ran to the river and played until it was dark."],
        ["From that day on, they met every morning.", "After that, they did everything together."],
    ],
    "share": [
        ["One day, {n} found {article_food}.", "One morning, {n} had {article_food} for breakfast."],
        ["It looked so good that {he} wanted to eat it all alone.", "{He} was very hungry and wanted to eat it at once."],
        ["Then {he} saw {article_m} named {m}, who had nothing to eat.", "Just then {article_m} named {m} came by. {m} looked hungry too."],
        ["{n} thought for a moment.", "{n} looked at the {food} and then at {m}."],
        ["\"We can share it,\" said {n}.", "\"Here, half of it is for you,\" said {n}."],
        ["{m} was so happy that {m_he} began to sing.", "\"You are very kind,\" said {m}."],
        ["They ate together in the sun, and it tasted better than ever.", "They sat in the grass and ate the {food} together."],
    ],
    "learn": [
        ["{n} wanted to learn how to {skill}.", "More than anything, {n} wanted to {skill}."],
        ["The first time {he} tried, {he} fell down.", "{He} tried and tried, but it did not work."],
        ["\"I will never learn it,\" {he} said.", "\"It is too hard,\" said {n}."],
        ["{article_M} named {m} heard {him} and said, \"Do not give up. Try it one more time.\"",
         "\"You only need to practise,\" said {article_m} named {m}."],
        ["So {n} practised every day.", "So {n} tried again, day after day."],
        ["One week later, {he} could do it!", "Then, one morning, it worked!"],
        ["{m} clapped and said, \"Well done, {n}!\"", "Everyone came to watch, and they all cheered."],
    ],
    "party": [
        ["It was the birthday of {n}, but nobody said a word about it.", "One day it was the birthday of {n}."],
        ["{He} thought that all {his} friends had forgotten it.", "{n} was sad because no one came to see {him}."],
        ["{n} went for a walk alone.", "So {he} went out and sat by the river."],
        ["Then {article_m} named {m} came and said, \"Come with me, quickly!\"",
         "Soon {article_m} named {m} came running. \"Please follow me,\" said {m}."],
        ["When they came home, all the friends were there.", "They walked to a big tree, and there stood all {his} friends."],
        ["\"Happy birthday!\" they shouted.", "\"Surprise!\" everyone called."],
        ["There was a big cake and {article_thing} as a present.", "{m} gave {him} {article_thing}, and they all ate cake."],
    ],
    "rescue": [
        ["One day, {n} heard someone call for help.", "One afternoon, {n} heard a small voice. \"Help! Help!\""],
        ["It was {article_m} named {m}, who had fallen into a deep hole.", "{article_M} named {m} was stuck in the mud and could not get out."],
        ["\"Please help me!\" said {m}.", "\"I cannot get out,\" cried {m}."],
        ["{n} had a good idea. {He} found a long stick.", "{n} thought quickly and ran to get a rope."],
        ["{He} held it tight and pulled with all {his} strength.", "\"Hold on!\" said {n}, and {he} pulled and pulled."],
        ["At last, {m} was free.", "With one last pull, {m} was safe."],
        ["\"You saved me!\" said {m}. \"Thank you!\"", "{m} thanked {him} a hundred times."],
    ],
    "seed": [
        ["One day, {n} found a small seed.", "In spring, {article_m} named {m} gave {n} a tiny seed."],
        ["{He} put it into the ground and gave it some water.", "{n} made a little hole, put the seed in it, and watered it."],
        ["Every morning {he} looked, but there was nothing to see.", "{n} waited and waited, but nothing happened."],
        ["\"Be patient,\" said the wind.", "\"Good things take time,\" {he} said to {hisself}."],
        ["Then the rain came, and then the sun came.", "It rained for three days, and then the sun came out."],
        ["One morning there was a small green leaf.", "At last, a little green plant looked out of the ground."],
        ["By summer it was the most beautiful flower of all.", "It grew and grew until it was a tall tree full of apples."],
    ],
    "race": [
        ["One day, {article_m} named {m} said, \"I am faster than you.\"", "One day, {n} and {article_m} named {m} wanted to have a race."],
        ["\"Let us run to the big tree,\" said {n}.", "\"We will run to the river and back,\" said {n}."],
        ["They started, and {m} was soon far ahead.", "{m} ran very fast, and {n} could not keep up."],
        ["But then {m} stopped to take a nap in the shade.", "But {m} was so sure to win that {m_he} sat down to rest."],
        ["{n} did not stop. Step by step, {he} went on.", "{n} was slow, but {he} never stopped."],
        ["In the end, {n} was the first at the finish.", "When {m} woke up, {n} had already won the race."],
        ["\"You are a good runner,\" said {m}, and they both laughed.", "{m} smiled and said, \"Next time I will not sleep.\""],
    ],
    "star": [
        ["One night, {n} could not sleep.", "One night, {n} looked at the sky."],
        ["{He} saw a bright star and made a wish.", "A star fell from the sky, and {n} made a wish."],
        ["\"I wish I had a friend to play with,\" {he} said.", "\"I wish for a great adventure,\" said {n}."],
        ["The next day, {article_m} named {m} knocked at the door.", "In the morning, {he} met {article_m} named {m} on the path."],
        ["\"I am looking for the blue lake,\" said {m}. \"Do you know the way?\"", "\"Will you come with me to the top of the hill?\" asked {m}."],
        ["\"Yes, I will show you,\" said {n}.", "\"Of course,\" said {n}, and they went together."],
        ["They walked all day and saw many wonderful things.", "On the way they sang songs and told each other stories."],
        ["That night, {n} looked at the star and said, \"Thank you.\"", "{n} knew that the wish had come true."],
    ],
    "boat": [
        ["One day, {n} wanted to cross the river.", "{n} always wanted to see the other side of the lake."],
        ["But {he} could not swim that far.", "But the water was deep and cold."],
        ["So {he} began to build a small boat.", "\"I will build a boat,\" {he} said."],
        ["{article_M} named {m} came and brought some wood.", "{n} asked {article_m} named {m} for help."],
        ["They worked for three days.", "They worked from morning until night."],
        ["When the boat was ready, they pushed it into the water.", "At last the boat was finished, and it was blue and white."],
        ["They sailed over the water and waved to the fish.", "The wind was soft, and the boat took them to the other side."],
        ["There they found a beach with yellow sand.", "On the other side they found a tree full of sweet pears."],
    ],
    "song": [
        ["Every evening, {n} sang a song.", "{n} had a very soft voice, and {he} was afraid to sing."],
        ["One day there was a big singing contest.", "One day, all the animals came together to sing."],
        ["{n} was nervous and wanted to run away.", "\"I cannot sing in front of so many animals,\" said {n}."],
        ["\"I will stand next to you,\" said {article_m} named {m}.", "{article_M} named {m} took {his} hand and said, \"You can do it.\""],
        ["So {n} closed {his} eyes and began to sing.", "{n} took a deep breath and started to sing."],
        ["The song was so beautiful that everyone was silent.", "Everyone stopped and listened."],
        ["When it was over, all the animals clapped.", "At the end they all cheered and called {his} name."],
    ],
}
SKILLS = ["swim", "fly", "climb a tree", "ride a bike", "dance", "whistle", "skate on the ice", "play the drum", "jump over the stream"]
ENDINGS = ["{n} was {feeling} and went home.", "{n} learned {lesson}.", "And they lived happily ever after.",
           "That night, {n} slept very well.", "{n} never forgot that day.", "From then on, {n} and {m} were best friends.",
           "And {n} was {feeling}.", "{n} went home with a big smile."]


def story(r, hero=None, adjective=None, opening=True):
    """A story of 8 to 12 sentences about hero, as one paragraph."""
    h = hero or Hero(r)
    f = Hero(r, h)
    thing, food = r.choice(THINGS), r.choice(FOODS)
    adj_m = r.choice(ADJECTIVES) + " " if r.random() < 0.4 else ""
    words = {
        "n": h.name, "he": h.he, "He": h.He, "him": h.him, "his": h.his, "hisself": h.him + "self", "m": f.name, "m_he": f.he,
        "article_m": article(adj_m + f.animal), "article_M": article(adj_m + f.animal).capitalize(), "thing": thing,
        "article_thing": article(thing), "food": food, "article_food": article(food), "spot": r.choice(SPOTS),
        "skill": r.choice(SKILLS), "feeling": r.choice(FEELINGS), "lesson": r.choice(LESSONS),
    }
    adj = adjective if adjective is not None else (r.choice(ADJECTIVES) if r.random() < 0.6 else "")
    kind = article((adj + " " + h.animal).strip())
    start = r.choices(["Once upon a time there was {k} named {n}.", "Once upon a time, there was {k} named {n}.",
                       "There once was {k} called {n}.", "{n} was {k}.", "Long ago, there lived {k} named {n}."],
                      [8, 4, 1, 2, 1])[0].format(k=kind, n=h.name)
    parts = [start] if opening else []
    extra = r.random()
    if extra < 0.75:
        parts.append(r.choice(["{} lived {}.", "{} lived {}."]).format(r.choice((h.name, h.He)), r.choice(PLACES)))
    if extra < 0.35 or extra > 0.75:
        parts.append("{} loved to {}.".format(r.choice((h.name, h.He)), r.choice(HOBBIES)))
    plot = r.choice(list(PLOTS))
    parts += [r.choice(options).format(**words) for options in PLOTS[plot]]
    end = r.choice(ENDINGS)
    while "{m}" in end and not any(f.name in p for p in parts):
        end = r.choice(ENDINGS)
    if end.startswith("And they lived") and not any(f.name in p for p in parts):
        end = "And {n} lived happily ever after."
    parts.append(end.format(**words))
    if r.random() < 0.3:
        parts.append("The end.")
    cut = r.randrange(3, 6)
    if r.random() < 0.3:
        return " ".join(parts[:cut]) + "\n\n" + " ".join(parts[cut:])
    return " ".join(parts)


def story_request(r):
    """A (question, answer) pair that asks for a story."""
    h = Hero(r)
    adj = r.choice(ADJECTIVES) if r.random() < 0.4 else ""
    kind = article((adj + " " + h.animal).strip())
    x = r.random()
    short = r.choice(["a story", "a short story", "a short story", "a little story"])
    called = r.choice(["named", "named", "called"])
    if x < 0.6:
        about = " about {} {} {}".format(kind, called, h.name)
    elif x < 0.8:
        about = " about " + kind
    elif x < 0.88:
        about, h.animal = " about {}".format(h.name), r.choice(ANIMALS)
        adj = None
    else:
        about, adj = "", None
    ask = r.choice(["Tell me {}{}.", "Tell me {}{}.", "Write {}{}.", "Please tell me {}{}.", "Can you tell me {}{}?",
                    "Please write {}{}.", "Could you write {}{}?", "I would like to hear {}{}.", "Make up {}{}."])
    return ask.format(short, about), story(r, h, adj)


# --------------------------------------------------------------------------------------------------------------
# Facts.

CAPITALS = dict(p.split(":") for p in """France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|England:London|
Ireland:Dublin|Scotland:Edinburgh|Norway:Oslo|Sweden:Stockholm|Denmark:Copenhagen|Finland:Helsinki|Iceland:Reykjavik|
Poland:Warsaw|Austria:Vienna|Hungary:Budapest|Greece:Athens|Turkey:Ankara|Russia:Moscow|Ukraine:Kyiv|Belgium:Brussels|
the Netherlands:Amsterdam|Switzerland:Bern|the Czech Republic:Prague|Romania:Bucharest|Bulgaria:Sofia|Croatia:Zagreb|
Egypt:Cairo|Kenya:Nairobi|Morocco:Rabat|Nigeria:Abuja|Ethiopia:Addis Ababa|China:Beijing|Japan:Tokyo|India:New Delhi|
Thailand:Bangkok|Vietnam:Hanoi|Indonesia:Jakarta|South Korea:Seoul|Australia:Canberra|New Zealand:Wellington|
Canada:Ottawa|the United States:Washington|Mexico:Mexico City|Brazil:Brasilia|Argentina:Buenos Aires|Chile:Santiago|
Peru:Lima|Cuba:Havana|Colombia:Bogota""".replace("\n", "").split("|"))
COLOURS = dict(p.split(":") for p in """the sky:blue|the sea:blue|grass:green|a leaf:green|a frog:green|a cucumber:green|
the sun:yellow|a banana:yellow|a lemon:yellow|butter:yellow|a chick:yellow|snow:white|milk:white|salt:white|a swan:white|
a cloud:white|an egg:white|paper:white|blood:red|a strawberry:red|a tomato:red|a cherry:red|a fire engine:red|a ruby:red|
coal:black|a raven:black|the night sky:black|tar:black|an orange:orange|a carrot:orange|a pumpkin:orange|chocolate:brown|
a bear:brown|wood:brown|coffee:brown|soil:brown|an elephant:grey|a mouse:grey|a stone:grey|a pig:pink|a flamingo:pink|
a plum:purple|lavender:purple|an emerald:green|a sapphire:blue|gold:yellow|a polar bear:white|a fox:red""".replace("\n", "").split("|"))
SOUNDS = dict(p.split(":") for p in """cow:moo|dog:woof|cat:meow|duck:quack|sheep:baa|pig:oink|horse:neigh|bee:buzz|
lion:roar|frog:croak|owl:hoot|mouse:squeak|snake:hiss|rooster:cock-a-doodle-doo""".replace("\n", "").split("|"))
LEGS = dict(p.split(":") for p in """dog:four|cat:four|cow:four|horse:four|bird:two|duck:two|spider:eight|ant:six|bee:six|
fish:no|snake:no|frog:four|penguin:two|rabbit:four|elephant:four|crab:ten|butterfly:six""".replace("\n", "").split("|"))
EATS = dict(p.split(":") for p in """rabbit:carrots and grass|cow:grass|cat:fish and mice|dog:meat and bones|horse:hay and oats|
monkey:bananas and other fruit|panda:bamboo|bear:berries, fish and honey|mouse:cheese and grain|squirrel:nuts|frog:flies|
bird:seeds and worms|lion:meat|koala:leaves|goat:grass and leaves|penguin:fish|giraffe:leaves""".replace("\n", "").split("|"))
OPPOSITES = [p.split(":") for p in """hot:cold|big:small|up:down|day:night|happy:sad|fast:slow|old:young|light:dark|wet:dry|
open:closed|full:empty|hard:soft|tall:short|good:bad|left:right|rich:poor|early:late|strong:weak|loud:quiet|clean:dirty|
heavy:light|near:far|inside:outside|first:last|black:white|long:short|new:old|easy:difficult""".replace("\n", "").split("|")]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()
ITEMS = "apples pears books balls cookies stones flowers eggs pencils stars cakes coins".split()
TENS = {20: "twenty", 30: "thirty", 40: "forty"}


def upper_first(s):
    return s[0].upper() + s[1:]


def number_word(n):
    return NUMBERS[n] if n <= 20 else TENS[n // 10 * 10] + ("-" + NUMBERS[n % 10] if n % 10 else "")


def capital(r):
    """(question, full answer, short answer)."""
    country = r.choice(list(CAPITALS))
    city = CAPITALS[country]
    x = r.random()
    if x < 0.72:
        q = r.choice(["What is the capital of {}?"] * 6 + ["What is the capital city of {}?", "Which city is the capital of {}?",
                     "Tell me the capital of {}.", "Do you know the capital of {}?", "Name the capital of {}."])
        return q.format(country), "The capital of {} is {}.".format(country, city), city + "."
    if x < 0.86:
        q = r.choice(["Which country has the capital {}?", "{} is the capital of which country?", "Of which country is {} the capital?"])
        return q.format(city), "{} is the capital of {}.".format(city, country), upper_first(country) + "."
    other = city if r.random() < 0.5 else r.choice(list(CAPITALS.values()))
    yes = other == city
    return ("Is {} the capital of {}?".format(other, country),
            ("Yes, {1} is the capital of {0}." if yes else "No, the capital of {0} is {1}.").format(country, city),
            "Yes." if yes else "No.")


def colour(r):
    thing = r.choice(list(COLOURS))
    c = COLOURS[thing]
    word = r.choice(["colour", "colour", "color"])
    q = r.choice(["What {0} is {1}?"] * 5 + ["What is the {0} of {1}?", "Which {0} is {1}?", "Tell me the {0} of {1}.",
                 "Do you know what {0} {1} is?"])
    return q.format(word, thing), upper_first("{} is {}.".format(thing, c)), upper_first(c) + "."


def addition(r):
    """(question, full answer, short answer) of a sum or difference of numbers up to 20."""
    x = r.random()
    if x < 0.62:
        a, b = r.randrange(21), r.randrange(21)
        op, word, c = "+", "plus", a + b
    else:
        a = r.randrange(21)
        b = r.randrange(a + 1)
        op, word, c = "-", "minus", a - b
    style = r.random()
    if style < 0.1:
        q = r.choice(["What is {} {} {}?", "How much is {} {} {}?"]).format(number_word(a), word, number_word(b))
        return q, "{} {} {} is {}.".format(upper_first(number_word(a)), word, number_word(b), number_word(c)), upper_first(number_word(c)) + "."
    if style < 0.2 and max(a, b) <= 20:
        item, h = r.choice(ITEMS), Hero(r)
        if op == "+":
            q = r.choice(["{n} has {a} {i} and gets {b} more. How many {i} does {n} have?",
                          "{n} has {a} {i} and finds {b} more. How many {i} does {n} have now?"])
        else:
            q = r.choice(["{n} has {a} {i} and gives away {b}. How many {i} does {n} have left?",
                          "{n} has {a} {i} and loses {b}. How many {i} are left?"])
        return (q.format(n=h.name, a=a, b=b, i=item), "{} {} {} = {}. {} has {} {}.".format(a, op, b, c, h.name, c, item), "{}.".format(c))
    q = r.choice(["What is {a} {o} {b}?"] * 5 + ["How much is {a} {o} {b}?", "What is {a} {w} {b}?", "Calculate {a} {o} {b}.", "{a} {o} {b} = ?",
                 "{a} {o} {b}", "{a} {o} {b} =", "What is {a}{o}{b}?", "Add {a} and {b}." if op == "+" else "Take {b} away from {a}."])
    return q.format(a=a, b=b, o=op, w=word), "{} {} {} = {}.".format(a, op, b, c), "{}.".format(c)


def small_fact(r):
    """Sounds, legs, food, opposites, days, months, counting, comparing."""
    k = r.randrange(8)
    if k == 0:
        a = r.choice(list(SOUNDS))
        return r.choice(["What sound does {} make?", "What does {} say?"]).format(article(a)), \
            "{} says {}.".format(upper_first(article(a)), SOUNDS[a]), upper_first(SOUNDS[a]) + "."
    if k == 1:
        a = r.choice(list(LEGS))
        return "How many legs does {} have?".format(article(a)), "{} has {} legs.".format(upper_first(article(a)), LEGS[a]), upper_first(LEGS[a]) + "."
    if k == 2:
        a = r.choice(list(EATS))
        return "What does {} eat?".format(article(a)), "{} eats {}.".format(upper_first(article(a)), EATS[a]), upper_first(EATS[a]) + "."
    if k == 3:
        a, b = r.choice(OPPOSITES)
        return r.choice(["What is the opposite of {}?", "Tell me the opposite of {}."]).format(a), \
            "The opposite of {} is {}.".format(a, b), upper_first(b) + "."
    if k == 4:
        table = r.choice((DAYS, DAYS, MONTHS))
        unit = "day" if table is DAYS else "month"
        i, step = r.randrange(len(table)), r.choice((1, -1))
        a, b = table[i], table[(i + step) % len(table)]
        w = "after" if step == 1 else "before"
        return "Which {} comes {} {}?".format(unit, w, a), "{} comes {} {}.".format(b, w, a), b + "."
    if k == 5:
        n = r.randrange(3, 21)
        return r.choice(["Count to {}.", "Count from 1 to {}.", "Can you count to {}?"]).format(n), \
            ", ".join(str(i) for i in range(1, n + 1)) + ".", ", ".join(str(i) for i in range(1, n + 1)) + "."
    if k == 6:
        a, b = r.sample(range(41), 2)
        w = r.choice(("bigger", "smaller"))
        c = max(a, b) if w == "bigger" else min(a, b)
        return "Which number is {}, {} or {}?".format(w, a, b), "{} is {} than {}.".format(c, w, a + b - c), "{}.".format(c)
    unit, table = r.choice((("days of the week", DAYS), ("months of the year", MONTHS), ("colours of the rainbow",
                            "red, orange, yellow, green, blue, indigo and violet")))
    full = table if isinstance(table, str) else ", ".join(table[:-1]) + " and " + table[-1]
    return r.choice(["What are the {}?", "Name the {}."]).format(unit), "The {} are {}.".format(unit, full), upper_first(full) + "."


def greeting(r):
    """(question, answer, None): small talk."""
    x = r.random()
    hello = r.choice(["Hello", "Hi", "Hello there", "Hi there", "Hey", "Good day"])
    if x < 0.35:
        return hello + r.choice(["!", ".", ""]), "Hello! How can I help you today?", None
    if x < 0.45:
        part = r.choice(["morning", "evening", "afternoon"])
        return "Good {}{}".format(part, r.choice("!.")), "Good {}! How can I help you today?".format(part), None
    if x < 0.55:
        h = Hero(r)
        return r.choice(["{}, my name is {}.", "{}, I am {}.", "{}! My name is {}."]).format(hello, h.name), \
            "Hello, {}! It is nice to meet you. How can I help you today?".format(h.name), None
    if x < 0.67:
        return r.choice(["How are you?", "Hello, how are you?", "How are you today?", "Hi! How are you doing?"]), \
            "I am fine, thank you! How can I help you today?", None
    if x < 0.77:
        return r.choice(["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?"]), \
            "I am a very small language model. I can tell short stories and answer a few simple questions.", None
    if x < 0.85:
        return r.choice(["What can you do?", "Can you help me?", "Help", "What do you know?", "How can you help me?"]), \
            "I can tell a short story, do small sums, and name colours and capitals. Try me!", None
    if x < 0.93:
        return r.choice(["Thank you!", "Thanks.", "Thank you very much.", "Thanks a lot!", "Great, thank you."]), "You are welcome!", None
    return r.choice(["Goodbye!", "Bye.", "See you later!", "Good night!", "Bye bye!"]), "Goodbye! Have a nice day.", None


UNKNOWN = """Who won the football game last night?|How does a car engine work?|What is the price of gold?|Who wrote this book?|
What is the weather today?|What is the meaning of life?|How far away is the moon?|What is quantum physics?|Who is the president?|
Write a program in Python.|Explain the theory of relativity.|What time is it?|How do I fix my computer?|What is the best film?|
When did the war end?|Translate this text into French.|How tall is the tallest tree?|Who painted the most famous picture?|
What is a black hole?|What is the speed of light?|How old is the earth?|What is democracy?|Why do birds fly south?|
What is an atom?|Who invented the telephone?|How much does a house cost?|Which team is the best?|What is the news today?|
Solve this equation for x.|What is the largest planet?|Can you book a flight for me?|What is machine learning?""".replace("\n", "").split("|")


def unknown(r):
    if r.random() < 0.3:
        land = "".join(r.choice(SYLLABLES) for _ in range(3)).capitalize()
        return "What is the capital of {}?".format(land), "I am sorry, I do not know that. I am a very small model.", "I do not know."
    return r.choice(UNKNOWN), "I am sorry, I do not know that. I am a very small model.", "I do not know."


# --------------------------------------------------------------------------------------------------------------
# How-to lists: gerund phrase, infinitive phrase, ten steps; the five marked * make the short list.

HOWTO = [s.strip().split("\n") for s in """
Building a website;build a website
*Decide what the website is for.
*Choose a short and clear name.
Buy a domain name.
Find a place to host the website.
*Draw a simple plan of the pages.
Pick two or three colours and one font.
*Write the text for each page.
Add pictures that fit the text.
Test every page and every link.
*Publish the website and tell your friends.

Making a cup of tea;make a cup of tea
*Fill the kettle with fresh water.
*Bring the water to a boil.
Choose your favourite tea.
Take a clean cup from the shelf.
*Put a tea bag into the cup.
*Pour the hot water over the tea.
Wait for three minutes.
Take the tea bag out of the cup.
Add milk, sugar or honey.
*Let the tea cool a little and enjoy it.

Planting a garden;plant a garden
*Find a sunny place.
Decide which plants you want to grow.
*Remove the grass and the weeds.
*Dig up the soil.
Mix some compost into the soil.
Draw lines for the rows.
*Put the seeds into the ground.
Cover the seeds with a little soil.
*Water the garden every day.
Wait, and enjoy the first flowers.

Baking a cake;bake a cake
*Read the recipe from start to end.
Heat the oven.
*Put flour, sugar, eggs and butter on the table.
Mix the butter and the sugar.
Add the eggs one by one.
*Stir in the flour.
Pour the batter into a cake tin.
*Bake the cake for forty minutes.
Let the cake cool down.
*Cut the cake and share it.

Writing a letter;write a letter
*Take a pen and a sheet of paper.
Find a quiet place.
Write the date at the top.
*Begin with a friendly greeting.
*Say why you are writing.
Tell some news about yourself.
Ask a few questions.
*Sign the letter with your name.
Put the letter into an envelope.
*Add a stamp and post the letter.

Washing the dishes;wash the dishes
*Clear the table.
Throw away the leftovers.
*Fill the sink with warm water.
Add a little soap.
Wash the glasses first.
*Wash the plates and the cups.
Wash the pots and the pans last.
*Rinse everything with clean water.
*Dry the dishes with a towel.
Put everything back on the shelf.

Cleaning a room;clean a room
*Open the window.
*Pick up everything from the floor.
Put the toys into the box.
Put the clothes into the closet.
*Make the bed.
Throw away old paper.
*Wipe the dust from the shelves.
Clean the mirror.
*Sweep the floor.
Enjoy the clean room.

Packing for a trip;pack for a trip
*Make a list of what you need.
Check the weather at the place.
*Take a bag of the right size.
Put the heavy things at the bottom.
*Roll up your clothes.
Pack a warm jacket.
*Do not forget your toothbrush.
Put your tickets into a side pocket.
Add a good book and a snack.
*Close the bag and check the list again.

Making a sandwich;make a sandwich
*Wash your hands.
*Take two slices of bread.
Put the bread on a plate.
*Spread butter on the bread.
Add a leaf of lettuce.
*Add cheese or ham.
Add two slices of tomato.
Add a little salt and pepper.
*Put the second slice on top.
Cut the sandwich in half and enjoy it.

Learning a language;learn a language
*Choose a language that you like.
Set a small goal for every week.
*Learn ten new words every day.
*Listen to songs in that language.
Watch films with subtitles.
Read books for children.
Write short notes.
*Speak with other people.
Do not be afraid of mistakes.
*Keep going every day.

Writing a short story;write a short story
*Think of a hero.
Give the hero a name and a home.
*Give the hero a problem.
Think of a friend who can help.
*Write the first sentence.
Tell what happens step by step.
*Find a good ending.
Read the story aloud.
Cut every word that you do not need.
*Give the story a title.

Taking care of a dog;take care of a dog
*Give the dog fresh water.
*Feed the dog twice a day.
*Go for a walk every morning.
Go for a walk every evening.
Brush its fur.
*Play with a ball.
Teach it to sit and to stay.
Visit the vet once a year.
Give it a soft place to sleep.
*Be patient and kind.

Painting a picture;paint a picture
*Put an old newspaper on the table.
*Take paper, paint and a brush.
Fill a cup with water.
*Decide what you want to paint.
Draw the big shapes with a pencil.
*Begin with the light colours.
Add the dark colours.
Clean the brush often.
Paint the small details last.
*Let the picture dry and hang it up.

Building a birdhouse;build a birdhouse
*Find a simple plan.
*Buy a wooden board.
Measure each part with a ruler.
*Saw the board into pieces.
Sand the edges.
Make a round hole in the front.
*Nail the parts together.
Put the roof on top.
Paint the birdhouse.
*Hang it in a quiet tree.

Making soup;make soup
*Wash the vegetables.
*Cut them into small pieces.
Cut an onion.
Put a little oil into a pot.
Fry the onion until it is soft.
*Add the vegetables.
*Fill the pot with water.
*Cook the soup for half an hour.
Add salt and pepper.
Serve the soup with bread.

Going to bed on time;go to bed on time
*Finish your work early.
*Turn off all the screens.
Eat only a small snack.
Put your things ready for the morning.
*Brush your teeth.
Wash your face.
*Put on your pyjamas.
Read a few pages of a book.
*Turn off the light.
Close your eyes and breathe slowly.

Making a paper boat;make a paper boat
*Take a sheet of paper.
*Fold it in the middle.
Turn the fold to the top.
*Fold both corners to the centre.
Fold the lower edges up.
*Open the paper like a hat.
Press it flat into a square.
Fold the corners up again.
*Pull the sides apart.
Put the boat on the water.

Planning a party;plan a party
*Choose a day.
*Write a list of guests.
Find a good place.
*Send the invitations.
Make a plan for the food.
*Buy food and drinks.
Decorate the room.
Choose some music.
Prepare a few games.
*Welcome your guests and have fun.

Learning to swim;learn to swim
*Find a good teacher.
*Start in shallow water.
Get used to the water.
*Practise breathing out under water.
Hold on to the edge and kick.
*Float on your back.
Learn the arm strokes.
Put arms and legs together.
Swim a short way.
*Practise every week.

Starting a small library;start a small library
*Collect books from your friends.
*Find a room with good light.
Build some shelves.
*Sort the books by subject.
Write a list of all the books.
Give each book a number.
*Make a card for every reader.
Put a table and chairs into the room.
*Open the doors.
Ask the readers what they like.
""".strip().split("\n\n")]


def step_list(steps, style):
    return "\n".join(("Step {}: {}" if style == "Step" else "{}. {}").format(i + 1, s) for i, s in enumerate(steps))


def pick_howto(r):
    if r.random() < 0.12:
        return HOWTO[0]
    return r.choice(HOWTO)


def howto_plain(r):
    head, *steps = pick_howto(r)
    gerund, infinitive = head.split(";")
    n = 10 if r.random() < 0.75 else 5
    chosen = [s.lstrip("*") for s in steps if n == 10 or s[0] == "*"]
    style = "Step" if r.random() < 0.25 else "1."
    title = r.choice(["{g} can be done in {n} simple steps:"] * 5 + ["{g} can be done in {n} easy steps:", "{g} in {n} simple steps:",
                     "How to {i} in {n} simple steps:", "Here is how to {i} in {n} steps:"]).format(g=gerund, i=infinitive, n=n)
    return title + "\n" + step_list(chosen, style)


def howto_request(r):
    head, *steps = pick_howto(r)
    gerund, infinitive = head.split(";")
    n = 10 if r.random() < 0.3 else 5
    q = r.choice(["How do I {i}?", "How can I {i}?", "Tell me how to {i}.", "Give me {n} steps to {i}."] if n == 5
                 else ["How can I {i} in {n} steps?", "Give me {n} steps to {i}.", "Explain how to {i} in {n} steps."]).format(i=infinitive, n=n)
    return q, "{} can be done in {} simple steps:\n".format(gerund, n) + step_list([s.lstrip("*") for s in steps if n == 10 or s[0] == "*"], "1.")


SAYINGS = {
    "I believe the meaning of life is": ["to be kind to others and to enjoy every day.", "to learn something new every day and to share it with friends.",
                                         "to love, to laugh, and to help each other."],
    "The best thing about winter is": ["the snow and a cup of hot tea.", "that you can skate on the ice."],
    "The best thing about summer is": ["the long days and the warm sea.", "that you can swim in the lake."],
    "Friends are important because": ["they help us when we are sad and laugh with us when we are happy."],
    "The quick brown fox": ["jumps over the lazy dog."],
    "My favourite animal is": ["the owl, because it is wise and quiet.", "the dolphin, because it is clever and friendly."],
    "Every morning I": ["get up, wash my face, and eat a slice of bread.", "open the window and listen to the birds."],
    "In the garden there is": ["a tall tree with red apples.", "a small pond with three frogs."],
    "The weather today is": ["warm and sunny, with a few white clouds."],
    "A good book is": ["like a good friend: it is always there for you."],
}

# --------------------------------------------------------------------------------------------------------------
# Documents.


def rough(r, q):
    """The question as a hurried user might type it, some of the time."""
    x = r.random()
    if x < 0.08:
        return q[0].lower() + q[1:]
    if x < 0.14:
        return q.rstrip("?.!")
    if x < 0.18:
        return (q[0].lower() + q[1:]).rstrip("?.!")
    return q


def chat(r, turns):
    """ChatML text of (question, answer) turns."""
    out = ""
    if r.random() < 0.15:
        out += "<|im_start|>system\n" + r.choice(["You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
                                                  "You are a helpful assistant. Be kind."]) + "<|im_end|>\n"
    for q, a in turns:
        out += "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n".format(q, a)
    return out


QUESTION_KINDS = [capital, colour, addition, small_fact, greeting, unknown]
QUESTION_WEIGHTS = [26, 18, 34, 14, 12, 4]


def turn(r, kinds=QUESTION_KINDS, weights=QUESTION_WEIGHTS):
    kind = r.choices(kinds, weights)[0]
    q, full, short = kind(r)
    if short is not None and r.random() < 0.06:
        return r.choice(["{} Answer with one word.", "{} Only the answer, please."]).format(q), short
    return rough(r, q), full


def doc_story(r):
    return story(r)


def doc_story_chat(r):
    turns = [turn(r, [greeting], [1])] if r.random() < 0.08 else []
    return chat(r, turns + [story_request(r)])


def doc_chat(r):
    return chat(r, [turn(r) for _ in range(r.choices((1, 2, 3, 4), (60, 20, 12, 8))[0])])


def doc_question_answer(r):
    """Plain question and answer lines; a bare answer."""
    head, tail = r.choices([("Question: ", "\nAnswer: "), ("Q: ", "\nA: ")], [3, 1])[0]
    out = []
    for _ in range(r.choices((1, 2, 3), (70, 18, 12))[0]):
        q, _, short = r.choices([capital, colour, addition, small_fact, unknown], [28, 18, 34, 14, 3])[0](r)
        out.append(head + q + tail + short)
    return "\n\n".join(out)


def doc_sums(r):
    """Lines of sums."""
    out = []
    tight = r.random() < 0.12
    for _ in range(r.randrange(1, 9)):
        if r.random() < 0.62:
            a, b = r.randrange(21), r.randrange(21)
            s = "{} + {} = {}".format(a, b, a + b)
        else:
            a = r.randrange(21)
            b = r.randrange(a + 1)
            s = "{} - {} = {}".format(a, b, a - b)
        out.append(s.replace(" ", "") if tight else s)
    return "\n".join(out)


def doc_statements(r):
    """Facts as plain sentences."""
    out = []
    for _ in range(r.randrange(1, 5)):
        kind = r.choices([capital, colour, small_fact], [5, 4, 2])[0]
        answer = kind(r)[1]
        if not answer.startswith(("Yes", "No,")):
            out.append(answer)
    return " ".join(out) or "The sky is blue."


def doc_howto(r):
    return howto_plain(r)


def doc_howto_chat(r):
    return chat(r, [howto_request(r)])


def doc_dialogue(r):
    """User and Assistant lines without control tokens."""
    return "\n".join("User: {}\nAssistant: {}".format(*turn(r)) for _ in range(r.choices((1, 2, 3), (60, 25, 15))[0]))


def doc_saying(r):
    if r.random() < 0.25:
        h = Hero(r)
        return r.choice(["Hello, my name is {}, and I love to {}.", "My name is {}, and I love to {}.", "Hello! My name is {}, and I love to {}."
                         ]).format(h.name, r.choice(HOBBIES))
    head = r.choice(list(SAYINGS))
    return head + " " + r.choice(SAYINGS[head])


# (function, share of documents)
KINDS = [(doc_story, 10), (doc_story_chat, 10), (doc_chat, 32), (doc_question_answer, 18), (doc_sums, 14), (doc_statements, 4),
         (doc_dialogue, 3), (doc_howto, 5), (doc_howto_chat, 3), (doc_saying, 1.5)]


def documents(n_docs, seed):
    """Yields n_docs documents; the same for the same seed."""
    r = random.Random(seed)
    makers, shares = zip(*KINDS)
    for _ in range(n_docs):
        yield r.choices(makers, shares)[0](r)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--docs", type=int, default=200000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("-o", "--output", default="-")
    args = p.parse_args()
    out = sys.stdout if args.output == "-" else open(args.output, "w", encoding="utf-8")
    for doc in documents(args.docs, args.seed):
        out.write(json.dumps(doc) + "\n")


if __name__ == "__main__":
    main()
