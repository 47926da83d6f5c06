"""Kinds of chat templates that real models have, each as a small one: what is learned, or what is to be changed."""

import json

import pytest

from trainer.data.encoding import Encoder
from trainer.data.messages import notes_on_calls
from trainer.data.tokenizers import END
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

SPECIAL = ["<user>", "<system>", "<assistant>", "<tool>", "<end>", "<think>", "</think>", "<call>", "</call>"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ADDS = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
CALLS = "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
CALL = '<call>{"name": "look", "arguments": {"of": "it"}}</call>'


@pytest.fixture(scope="module")
def tokenizer():
    """Every character is a token, and so is what templates write of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({END: 0, **{letter: number for number, letter in enumerate(letters, 1)}}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END, pad_token=END,
                                   additional_special_tokens=SPECIAL)


@pytest.fixture
def learn(tokenizer):
    """(what stands before, what is learned) of each stretch that is learned, document by document."""
    def learn(template, messages, tools=None):
        tokenizer.chat_template = template
        found = []
        for one in Encoder(tokenizer, Data(messages="m", tools="t" if tools else None), True)(
                [{"m": messages, "t": tools}]):
            marks = [False, *one.loss_mask.tolist(), False]
            begins = [at for at in range(len(one)) if marks[at + 1] and not marks[at]]
            ends = [at for at in range(1, len(one) + 1) if marks[at] and not marks[at + 1]]
            found += [(tokenizer.decode(one.tokens[:begin]), tokenizer.decode(one.tokens[begin:end]))
                      for begin, end in zip(begins, ends, strict=True)]
        return found

    yield learn
    tokenizer.chat_template = None


def plain(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def called(*arguments, thoughts=None, content=""):
    calls = [{"type": "function", "function": {"name": "look", "arguments": one}} for one in arguments]
    thinks = {"reasoning_content": thoughts} if thoughts else {}
    return [{"role": "user", "content": "u"}, {"role": "assistant", "content": content, "tool_calls": calls, **thinks},
            *plain(*[("tool", "cold")] * len(calls), ("assistant", "yes"))]


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_header_between_two_answers_is_the_templates(learn, between):
    """A template that prompts after a question alone writes one before a second answer all the same."""
    template = CHATML.replace("<end>\n", "<end>" + between) + ADDS.replace(
        "prompt %}", "prompt and messages[-1]['role'] != 'assistant' %}")
    end = "<end>" + between
    found = learn(template, plain(("user", "u"), ("assistant", "a"), ("assistant", "b"), ("user", "v"),
                                  ("assistant", "c")))
    first = f"<user>u{end}<assistant>"
    second = f"{first}a{end}<assistant>"
    assert found == [(first, f"a{end}"), (second, f"b{end}"), (f"{second}b{end}<user>v{end}<assistant>", f"c{end}")]


def test_an_answer_with_thoughts_where_the_prompt_has_empty_ones(learn):
    """What prompt and text have in common is given; what the answer has instead of the prompt's rest is learned."""
    template = ("{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}<think>\n"
                "{{ m['reasoning_content'] or '' }}\n</think>\n\n{% endif %}{{ m['content'] }}<end>\n{% endfor %}"
                "{% if add_generation_prompt %}<assistant><think>\n\n</think>\n\n{% endif %}")
    thinks = [*plain(("user", "u")), {"role": "assistant", "content": "a", "reasoning_content": "so"}]
    assert learn(template, thinks) == [("<user>u<end>\n<assistant><think>\n", "so\n</think>\n\na<end>\n")]
    assert learn(template, plain(("user", "u"), ("assistant", "a"))) == [
        ("<user>u<end>\n<assistant><think>\n\n</think>\n\n", "a<end>\n")]


def test_a_call_where_the_prompt_opens_thoughts(learn):
    """Two special tokens that begin with the same character are still two: the one that the answer has is learned."""
    template = ("{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>"
                "{% if m['role'] == 'assistant' and not m['tool_calls'] %}<think></think>{% endif %}"
                "{{ m['content'] }}" + CALLS + "<end>{% endfor %}"
                "{% if add_generation_prompt %}<assistant><think>{% endif %}")
    (before, call), (_, answer) = learn(template, called({"of": "it"}), [TOOL])
    assert before.endswith("<user>u<end><assistant>") and call == f"{CALL}<end>"
    assert answer == "</think>yes<end>"


def test_the_end_that_is_written_before_what_follows_is_learned(learn):
    template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' and not "
                "loop.last %}{{ '\n' }}" + END + "{% endif %}{% endfor %}" + ADDS)
    found = learn(template, plain(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")))
    assert found == [("<user>u<assistant>", f"a\n{END}"), (f"<user>u<assistant>a\n{END}<user>v<assistant>", f"b{END}")]


@pytest.mark.parametrize("arguments", ["", None])
def test_a_call_without_content_where_contents_are_parts(learn, arguments):
    template = CHATML.replace("{{ m['content'] }}", "{% if m['content'][0]['type'] == 'text' %}{{ m['content'][0]["
                              "'text'] }}{% endif %}" + CALLS) + ADDS
    messages = called({"of": "it"})
    messages[1]["content"] = arguments
    assert [said for _, said in learn(template, messages)] == [f"{CALL}<end>\n", "yes<end>\n"]


def test_a_template_that_always_begins_an_answer_is_refused(learn):
    messages = plain(("user", "u"), ("assistant", "a"))
    with pytest.raises(UserError, match="begins another answer at the end of every conversation") as refused:
        learn(CHATML + "<assistant>", messages)
    assert "{% if add_generation_prompt %}" in refused.value.way_out
    assert learn(CHATML + ADDS, messages) == [("<user>u<end>\n<assistant>", "a<end>\n")]
    for other in (CHATML, "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
                  "{% else %}{{ m['content'] }}" + END + "{% endif %}{% endfor %}"):
        assert learn(other, messages)[0][1].startswith(("a", "<assistant>a"))  # these have no such beginning


def test_a_system_message_that_only_prompts_have(learn):
    template = ("{% for m in messages %}{% if m['role'] == 'user' %}[{% if loop.last and messages[0]['role'] == "
                "'system' %}{{ messages[0]['content'] }}\n{% endif %}{{ m['content'] }}]{% elif m['role'] == "
                "'assistant' %}{{ m['content'] }}" + END + "{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="another prompt than a server's") as refused:
        learn(template, plain(("system", "s"), ("user", "u"), ("assistant", "a")))
    assert refused.value.way_out == "put the text of the system message at the beginning of the first user message"
    assert learn(template, plain(("user", "s\nu"), ("assistant", "a"))) == [("[s\nu]", f"a{END}")]


def refuses(condition):
    return f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"


SPEAKS = CHATML.replace("{{ m['content'] }}", "{{ m['reasoning_content'] or '' }}{{ m['content'] }}" + CALLS) + ADDS
USERS = "messages | selectattr('role', 'equalto', 'user') | list"
TURNS = ("{% for m in messages %}" + refuses("m['role'] not in ('user', 'assistant') or "
                                             "(m['role'] == 'user') != (loop.index0 % 2 == 0)") + "{% endfor %}")
TWO = called({"of": "it"}, {"of": "me"})


@pytest.mark.parametrize(("template", "messages", "advice", "mended", "answers"), [
    (TURNS, plain(("system", "s"), ("assistant", "hi"), ("user", "u"), ("user", "v"), ("assistant", "a")),
     ["beginning of the first user message", "remove the assistant's message before", "join messages of one role"],
     plain(("user", "s\nu\nv"), ("assistant", "a")), ["a<end>\n"]),
    (TURNS, plain(("system", "s"), ("assistant", "a")), ["wants a message of the user"],
     plain(("user", "u"), ("assistant", "a")), ["a<end>\n"]),
    (refuses(f"not {USERS}"), plain(("system", "s"), ("assistant", "a")), ["wants a message of the user"],
     plain(("system", "s"), ("user", "u"), ("assistant", "a")), ["a<end>\n"]),
    (TURNS, called({}), ["does not write these calls and their results: remove records that have them"],
     plain(("user", "u"), ("assistant", "a")), ["a<end>\n"]),
    ("{% for m in messages %}" + refuses("m['tool_calls'] and m['tool_calls'] | length > 1") + "{% endfor %}", TWO,
     ["takes one call in a message"], [TWO[0], {**TWO[1], "tool_calls": TWO[1]["tool_calls"][:1]}, TWO[2],
                                       {**TWO[1], "tool_calls": TWO[1]["tool_calls"][1:]}, *TWO[3:]],
     [f"{CALL}<end>\n", f"{CALL.replace('it', 'me')}<end>\n", "yes<end>\n"]),
    ("{% for m in messages %}" + refuses("m['tool_calls'] and m['content'] and m['reasoning_content']")
     + "{% endfor %}",
     called({"of": "it"}, thoughts="so", content="first"), ["content or thoughts in a message that calls, not both"],
     called({"of": "it"}, content="first"), [f"first{CALL}<end>\n", "yes<end>\n"]),
    (refuses("functions is not defined"), plain(("user", "u"), ("assistant", "a")),
     ["refuses a plain question and its answer as well: mend the template"], None, None),
])
def test_a_refusal_says_what_the_template_takes(learn, template, messages, advice, mended, answers):
    with pytest.raises(UserError, match="the chat template refuses a record") as refused:
        learn(template + SPEAKS, messages)
    assert all(words in refused.value.way_out for words in advice)
    if mended:
        assert [said for _, said in learn(template + SPEAKS, mended)] == answers


def test_a_template_that_wants_tools_or_cannot_write_them_says_so(learn):
    messages = plain(("user", "u"), ("assistant", "a"))
    wants = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHATML + ADDS
    with pytest.raises(UserError, match="refuses a record") as refused:
        learn(wants, messages)
    assert "name their field in `data.tools`" in refused.value.way_out
    assert [said for _, said in learn(wants, messages, [TOOL])] == ["a<end>\n"]
    cannot = refuses("tools") + CHATML + ADDS
    with pytest.raises(UserError, match="refuses a record") as refused:
        learn(cannot, messages, [TOOL])
    assert "leave `data.tools` out" in refused.value.way_out
    assert [said for _, said in learn(cannot, messages)] == ["a<end>\n"]


def test_thoughts_that_are_written_after_a_first_answer_alone_are_learned(learn):
    template = CHATML.replace("{{ m['content'] }}", "{% if loop.index0 > 2 %}{{ m['reasoning_content'] }}{% endif %}"
                              "{{ m['content'] }}") + ADDS
    messages = plain(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    messages[3]["reasoning_content"] = "so "
    assert [said for _, said in learn(template, messages)] == ["a<end>\n", "so b<end>\n"]
    with pytest.raises(UserError, match="does not write, so that it would be learned without its thought"):
        learn(CHATML + ADDS, messages)


# ---- notes

def test_marks_that_hold_what_a_prompt_ends_with_are_named(tokenizer, learn):
    marked = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<assistant>{{ m['content'] }}"
              "<end>{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endif %}{% endfor %}")
    assert learn(marked + ADDS, plain(("user", "u"), ("assistant", "a"))) == [("<user>u<end>", "<assistant>a<end>")]
    (note,) = Encoder(tokenizer, Data(messages="m")).notes
    assert "marks hold '<assistant>', which a prompt ends with: it is learned too" in note


def test_calls_without_a_field_of_tools_are_named():
    records = [{"m": plain(("user", "u"), ("assistant", "a"))}, {"m": json.dumps(called({}))}]
    (note,) = notes_on_calls(records, Data(messages="m"))
    assert "messages call tools, and data.tools names no field" in note
    assert not notes_on_calls(records[:1], Data(messages="m"))
    assert not notes_on_calls(records, Data(messages="m", tools="t"))


def test_thoughts_that_a_template_leaves_out_are_counted(tokenizer):
    from trainer.data.show_data import left_out_thoughts

    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}<end>"
                               "{% endfor %}" + ADDS)
    encoder = Encoder(tokenizer, Data(messages="m"), True)
    records = [{"m": plain(("user", "u"), ("assistant", "<think>so</think>a"))},
               {"m": plain(("user", "u"), ("assistant", "<think>\nthus\n</think>b"))},
               {"m": plain(("user", "u"), ("assistant", "c"))}]
    pairs = [(record, encoder([record])) for record in records]
    (note,) = left_out_thoughts(tokenizer, encoder, pairs)
    assert note.startswith("2 of 2 answers with thoughts are learned without them")
    tokenizer.chat_template = CHATML + ADDS
    encoder = Encoder(tokenizer, Data(messages="m"), True)
    assert not left_out_thoughts(tokenizer, encoder, [(records[0], encoder(records[:1]))])
    tokenizer.chat_template = None
