"""What is not the target: short everyday prompts for the general mix, and others for the forgetting test.

Both tuples run in rounds of twelve kinds (explain, list, rewrite, summarise, small talk, advice, science,
history, cooking, arithmetic, translation, two-liner), so that the first few are as varied as all of them.
"""

from q2t.records import Problem, Split, content_id

PROMPTS: tuple[str, ...] = (
    # round 1
    "Explain in two sentences how a library decides where each book belongs on its shelves.",
    "List three small animals that sleep through the winter, one short line for each.",
    "Rewrite this politely in one sentence: Move your bags, you are blocking the whole corridor.",
    "Summarise in at most ten words: The ferry was cancelled because thick fog hid the harbour until noon.",
    "Good morning! I just finished a long walk; reply with one friendly sentence.",
    "I keep forgetting people's names at parties. Give me one short tip that helps.",
    "Why does ice float on water? Answer in no more than two sentences.",
    "Who was Cleopatra, and why is she remembered? Two sentences are enough.",
    "How many minutes should I boil an egg for a soft yolk? Keep it brief.",
    "A bakery sells 14 rolls at 3 coins each. What is the total? Just the number.",
    "What is the French word for butterfly? Give the word and nothing else.",
    "Write a rhyming two-liner about a cat who guards an empty teapot.",
    # round 2
    "What does a lighthouse do for sailors at night? A brief explanation, please.",
    "Name five vegetables that grow underground, separated by commas, with no further text.",
    "Make this sentence shorter: Due to the fact that it was raining, we decided to stay at home.",
    "Give the main point in one line: Maria trained for two years before she ran her first marathon.",
    "It is Friday evening at last. What would you say to a tired colleague, in few words?",
    "How can I fall asleep faster after a busy day? Two brief suggestions will do.",
    "What makes a rainbow appear after a shower? Reply in one or two sentences.",
    "In which century did Gutenberg print his Bible, and what changed? Answer briefly.",
    "Suggest a quick sauce for plain pasta and name its ingredients in a single sentence.",
    "If I cut a 96 centimetre ribbon into 8 equal pieces, how long is one? Number only.",
    "Translate the word bread into Spanish and add one example phrase of at most six words.",
    "Compose two short lines of verse in praise of a muddy garden boot.",
    # round 3
    "Explain to a six-year-old, in two short sentences, why people pay taxes.",
    "Give me four colours that suit a calm bedroom, as a simple list.",
    "Turn this into a question, changing as little as possible: The museum closes early on Mondays.",
    "Boil this down to eight words: Our neighbour lost his keys, so he spent the night in a hotel.",
    "Hello there, how do you like the autumn? Chat back in a line or two.",
    "My houseplant has yellow leaves. What should I check first? One sentence is fine.",
    "How do bees find their way back to the hive? Keep your answer under forty words.",
    "What was the Silk Road used for? Tell me in two sentences at most.",
    "Which herb goes well with roast lamb, and why? A short reply is enough.",
    "Tom is 9 and his sister is twice as old. How old is she? Answer with a number.",
    "How do you say thank you in Japanese? Just the romanised form.",
    "Write a two-line poem in which the moon forgets its coat.",
    # round 4
    "In simple words and at most two sentences, what is inflation in an economy?",
    "Name three things to pack for a day at the beach. No explanations, please.",
    "Rewrite in the past tense, one sentence: She walks to school and sings on the way.",
    "Condense to one short sentence: The old bridge was closed, repaired, and opened again in May.",
    "I passed my driving test today! Congratulate me in a sentence or two.",
    "I have to give a speech at a wedding and I am nervous. One quick piece of advice?",
    "Why do leaves turn red and yellow before winter? A two-sentence answer, please.",
    "Who painted the ceiling of the Sistine Chapel, and about when? Be brief.",
    "How can I keep cut apples from turning brown? Tell me in one sentence.",
    "What is 15 percent of 200? Show one short step and the result.",
    "Give the German word for bridge together with its article, nothing more.",
    "Invent a cheerful two-line slogan for a bookshop that also sells soup.",
    # round 5
    "What is the job of a notary? Describe it in no more than thirty words.",
    "List four team sports that are played with a ball. Only their names.",
    "Change this to a friendly tone, short: Your report is late again and full of mistakes.",
    "State the gist in under twelve words: The cinema was sold out, so the twins went bowling and loved it.",
    "What is your favourite kind of weather to talk about? A playful line is plenty.",
    "How do I politely turn down an invitation to dinner? Offer a one-sentence example.",
    "What causes the tides in the sea? Explain shortly, two sentences or fewer.",
    "Why was the Great Wall of China built? A short answer will do.",
    "Name a dessert that needs no oven and describe it in one brief sentence.",
    "A train leaves at 10:40 and arrives at 13:05. How long is the ride? Reply in a few words.",
    "What is the Italian word for window? Answer with one word.",
    "Two lines, rhymed: a snail who wins a race by patience.",
    # round 6
    "Describe how a tailor measures someone for a jacket, in two plain sentences.",
    "Which three European capitals lie on the river Danube? Just list their names.",
    "Correct the grammar and return only the sentence: Him and me was going to the market yesterday.",
    "Sum up in one phrase: The team practised in rain and snow, and finally won the cup.",
    "My dog stole my sandwich this afternoon. Say something funny about it, briefly.",
    "What is a good first step for someone who wants to save money? One or two sentences.",
    "Why can we see lightning before we hear thunder? Answer in a sentence.",
    "What did the Rosetta Stone help scholars to do? Please answer in one sentence.",
    "How do I tell whether a pineapple is ripe? Two short hints, please.",
    "Add 27, 35 and 18, and tell me only the sum.",
    "Translate good night into Portuguese; leave out any comment.",
    "Write two silly lines about a king who is afraid of spoons.",
    # round 7
    "What is the difference between a novel and a short story? One sentence, please.",
    "Suggest three names for a goldfish, each with no more than two words.",
    "Rewrite for a formal letter, one sentence: Hey, can you send me the stuff by Tuesday?",
    "Shorten to a headline of six words: After a long debate, the village council agreed to plant trees.",
    "Tea or coffee: which do you prefer? Pick one and say why in a line.",
    "I want to read more books this year. Share one habit that works, in brief.",
    "How does soap remove grease from hands? Use at most two sentences.",
    "Name the ship on which Darwin travelled, and what the voyage led to. Keep it short.",
    "What can I use in place of eggs in pancakes? Mention two options briefly.",
    "A rectangle is 7 metres by 5 metres. What is its area? A brief answer with the unit.",
    "What does the Latin word aqua mean in English? A single word will do.",
    "Make up a two-line riddle whose answer is a shadow, then give the answer.",
    # round 8
    "Why do shops put milk at the back? Explain the idea in one or two sentences.",
    "Give three synonyms for happy, in a comma-separated line without any explanation.",
    "Put this in the passive voice and keep it to one sentence: The gardener watered the roses.",
    "In one brief sentence, what happened: Lena missed her bus, walked home and found a lost puppy.",
    "Tell me a gentle joke about penguins, two sentences at the most.",
    "How should I apologise to a friend whose birthday I missed? Suggest two short sentences.",
    "What is a fossil? Define it in fewer than twenty-five words.",
    "Which city was buried by Vesuvius in the year 79? Name it and add one short fact.",
    "How long does fresh basil keep, and where should I put it? Short answer, please.",
    "What is 144 divided by 12, plus 6? Give just the final value.",
    "Tell me the Dutch word for house, and nothing besides.",
    "Write a couplet about an umbrella that dreams of sunshine.",
    # round 9
    "Why are many good tennis players left-handed? A sentence or two will do.",
    "List the four seasons in order, starting with spring, on one line.",
    "Say it in simpler English, one sentence: The physician advised abstinence from saccharine beverages.",
    "Compress into nine words or fewer: Heavy snow shut every school in the valley for three days.",
    "I am bored on this long train ride. Propose a tiny game in two sentences.",
    "Is it better to study in the morning or late at night? Advise me in two lines.",
    "Why is the sky blue during the day? A short explanation of one or two sentences.",
    "Who was the first person to walk on the Moon, and in which year? Few words only.",
    "Describe how to toast almonds in a pan, in two short steps.",
    "If 5 pencils cost 40 cents, what do 8 pencils cost? One short line.",
    "What is the Swedish word for friend? Reply with that one word.",
    "Give me two rhymed lines in which a clock apologises for being late.",
    # round 10
    "Explain the offside rule of football as briefly as you can, in two sentences.",
    "Name three famous composers and one work of each, in a short list.",
    "Replace the cliché with plain words, one sentence: At the end of the day, it is what it is.",
    "Pick out the key fact in a few words: Founded in 1820, the mill still grinds flour each autumn.",
    "Imagine we meet in a lift. Break the silence with one pleasant remark.",
    "My desk is always a mess. What is one small rule that could help? Be concise.",
    "How does a vaccine prepare the body against a disease? Two sentences, simple words.",
    "What ended the Hundred Years' War, and who fought in it? Respond in a sentence or two.",
    "How does roasting differ from baking? One sentence suffices here.",
    "How many seconds are there in a quarter of an hour? Only the figure, please.",
    "A Spaniard hands you a libro. What is it? Answer with one English word.",
    "Pen two brief lines for a birthday card to a grandmother who loves to dance.",
)

TEST_PROMPTS: tuple[str, ...] = (
    # round 1
    "Tell me in two sentences how a seed becomes a sunflower.",
    "Name three musical instruments with strings; the names alone are enough.",
    "Rephrase in a kinder way, using one sentence: This soup tastes like dishwater.",
    "Reduce this to seven words: The mayor thanked all volunteers who had cleaned the beach on Sunday.",
    "I am moving to a new city next week. Wish me well in one line.",
    "How can I stop biting my nails? Recommend one simple trick, briefly.",
    "Why do cats purr? Give me the usual explanation in at most two sentences.",
    "What did Marie Curie discover? Two sentences are plenty.",
    "How much salt belongs in the water for boiling potatoes? A quick rule of thumb.",
    "There are 23 pupils and 4 stay at home. How many come to class? Number only.",
    "What is the Polish word for milk? One word, no explanation.",
    "Write two rhyming lines about a pirate who collects buttons.",
    # round 2
    "What is a mortgage? Put it in plain language, thirty words or fewer.",
    "Mention three countries in South America that touch the Pacific, as a bare list.",
    "Fix the spelling and repeat just the sentence: Thier freinds recieved a beutiful presant.",
    "What is this about, in five words: The orchestra tuned up while latecomers hurried to their seats.",
    "Someone sneezes beside you on a park bench. What do you say? A short reply.",
    "A colleague talks too loudly on the phone. How do I raise it? Two sentences.",
    "How far away is the Sun, roughly, and how long does its light take? Be short.",
    "When did the Berlin Wall fall, and what followed? Reply in two brief sentences.",
    "Suggest a filling for a vegetarian sandwich in no more than fifteen words.",
    "What is half of 90 minus 17? Write one line with the result.",
    "Translate the word mountain into Russian, in Latin letters, and stop there.",
    "Compose a tiny two-line lullaby for a sleepy hedgehog.",
    # round 3
    "Why do we shake hands when we greet each other? One or two sentences.",
    "Give four words that rhyme with light, on a single line.",
    "Join these into one smooth sentence: The shop is small. It sells hats. I love it.",
    "Give a one-sentence summary: The explorer ran out of food, turned back, and reached the camp at dawn.",
    "What would be a nice thing to say to a new neighbour? One sentence, please.",
    "I get seasick easily. What might help before a boat trip? Answer in brief.",
    "What do earthworms do for the soil? Respond in two short sentences.",
    "Who were the Vikings, and where did they come from? Thirty words at most.",
    "Why should dough rest before it is rolled out? Answer in one sentence.",
    "A film of 135 minutes starts at 19:00. When does it end? Just the time.",
    "How do you say sister in Finnish? The bare word, please.",
    "In two lines, let a broom complain about the dust.",
    # round 4, begun
    "Explain what a proverb is and quote one, in two sentences at most.",
    "Which three fruits are usually yellow when ripe? List them briefly.",
    "Rewrite without the double negative, one sentence: I did not see nobody in the garden.",
    "Capture the idea in ten words or fewer: Night trains are popular again as travellers dislike airports.",
)


def problems(count: int, test_count: int) -> list[Problem]:
    """The first `count` prompts (general), then the first `test_count` test prompts (general_test).

    Raises:
        ValueError: more are asked for than were written.
    """
    return _take("general", PROMPTS, count) + _take("general_test", TEST_PROMPTS, test_count)


def _take(split: Split, prompts: tuple[str, ...], count: int) -> list[Problem]:
    if count > len(prompts):
        raise ValueError(f"capability.{split} is {count}, but only {len(prompts)} prompts exist: lower it")
    return [
        Problem(
            id=content_id("general", {"prompt": prompt}, prompt),
            family="general",
            domain="general",
            split=split,
            inputs={"prompt": prompt},
            question=prompt,
            check={},
        )
        for prompt in prompts[:count]
    ]
