"""How the demo model of `python -m pyserve` is made: data, tokenizer, training, evaluation.

The model is a Llama of a few million parameters that knows a dozen small tasks in English and
Spanish. Nothing is downloaded: every conversation is made up here from templates and slot values,
the same ones for the same seed.

    python -m bench.demo_train.train --out DIR              # one GPU; evaluates, prints the table
    python -m bench.demo_train.train --out DIR --smoke      # CPU, a minute: only shows the road
    python -m bench.demo_train.evaluate                     # the table for the packaged model

What is where (a file reads only those above it):

    knowledge.py  what is known by heart: capitals, explained terms
    phrasing.py   templates: training/held-out split, filling, roughening of user text
    slots.py      values for templates; half of them are made up
    smalltalk.py  greetings, identity, names           fallback.py  what it cannot do
    facts.py      capitals, terms, poems, raw text     skills.py    sums, counting, copying, JSON
    speed.py      speed problems in <think> steps      weather.py   the tool, Hermes format
    data.py       mixes exchanges into conversations; token arrays and loss masks
    tokenizer.py  byte-level BPE, saved with the chat template in Hugging Face's layout
    evaluate.py   held-out examples, a line a task; exit status 1 when one is under 90 %
    train.py      LlamaForCausalLM, AdamW, batches of one padded length; writes the directory

Honest ranges: + and - with 0..999 (negative results down to -99), products and quotients up to
12 x 12 and two digits times one; speed problems whose numbers divide evenly. Held out means: a
phrasing that no training conversation used, filled with values (names, words, number pairs, cities)
that none used. Facts cannot be guessed: for them only the phrasings are new. The held-out phrasings
were looked at when training ones were added, so their figures are those of a development set.

The packaged weights come from several runs on one H200, 6.2 minutes from nothing, then 3.6 and 2.4
with --init after phrasings were added, and from 80 steps on a CPU; not from one run of this data.
"""
