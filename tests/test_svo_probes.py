"""SVO-Probes as distributed, with lists of files and prompts, and gone wrong."""

import json

import pytest
from data_files import LEFT_OUT, draw, write
from PIL import Image

from hooked_vlm.data import read_choices, read_svo_probes
from hooked_vlm.data.svo_probes import ing_form


def line(pos, neg, pos_url, neg_url, differs, sentence="A sentence, not read."):
    flags = {flag: str(flag == differs) for flag in ("subj_neg", "verb_neg", "obj_neg")}
    return {
        "sentence": sentence,
        "pos_triplet": pos,
        "neg_triplet": neg,
        "pos_url": f"https://example.org/some/{pos_url}?size=1",
        "neg_url": f"https://example.org/other/{neg_url}",
        **flags,
        "pos_image_id": "7",
    }


SVO = [
    line("man,run,sea", "woman,run,sea", "a.jpg", "b.jpg", "subj_neg"),
    line("['dog,sit,lawn', 'cat,sit,lawn']", "dog,lie,lawn", "c%20c.jpg", "d.jpg", "verb_neg"),
    line("girl,eat,cake", "girl,eat,apple", "e.jpg", "b.jpg", "obj_neg"),
]
FILES = ["a.jpg", "b.jpg", "c c.jpg", "d.jpg", "e.jpg"]


@pytest.fixture
def svo(tmp_path):
    for number, name in enumerate(FILES):
        draw(tmp_path / "images" / name, number)
    return tmp_path


def test_svo_probes_asks_of_both_photographs(svo):
    choices = read_svo_probes(write(svo / "svo_probes.csv", SVO), svo / "images", seed=0)
    told = [
        (one.name, one.text, one.answer, one.foil, one.image.name, one.other_image.name, one.group)
        for one in choices
    ]
    man, dog, girl = (
        "is man or woman run sea?",
        "is dog sit or lie lawn?",
        "is girl eat cake or apple?",
    )
    assert told == [
        ("2 positive", man, "man", "woman", "a.jpg", "b.jpg", "subj_neg"),
        ("2 negative", man, "woman", "man", "b.jpg", "a.jpg", "subj_neg"),
        ("3 positive", dog, "sit", "lie", "c c.jpg", "d.jpg", "verb_neg"),
        ("3 negative", dog, "lie", "sit", "d.jpg", "c c.jpg", "verb_neg"),
        ("4 positive", girl, "cake", "apple", "e.jpg", "b.jpg", "obj_neg"),
        ("4 negative", girl, "apple", "cake", "b.jpg", "e.jpg", "obj_neg"),
    ]
    assert [dict(one.roles) for one in choices.items[::2]] == [
        {"verb": "run", "object": "sea"},
        {"subject": "dog", "object": "lawn"},
        {"subject": "girl", "verb": "eat"},
    ]
    assert {name: words.words for name, words in choices.vocabularies.items()} == {
        "subject": ("dog", "girl", "man", "woman"),
        "verb": ("eat", "lie", "run", "sit"),
        "object": ("apple", "cake", "lawn", "sea"),
    }
    assert (choices.report.read, choices.report.kept) == (6, 6)
    sampled = choices.sample(2, seed=0)  # both directions are there, in all three groups
    assert len(sampled) == 6
    assert read_choices("svo-probes", svo, seed=0).items == choices.items


def test_svo_probes_may_draw_the_order_of_the_options(svo):
    table = write(svo / "svo_probes.csv", SVO)
    drawn = [
        [one.answer_first for one in read_svo_probes(table, svo / "images", seed=s, order="drawn")]
        for s in range(12)
    ]
    assert all(flags[::2] == [not flag for flag in flags[1::2]] for flags in drawn)
    assert all({flags[index] for flags in drawn} == {True, False} for index in range(0, 6, 2))


BAD_SVO = [
    ({"pos_triplet": "['[]']"}, "no triplet", "is not subject, verb and object"),
    ({"pos_triplet": "man,run"}, "no triplet", "'man,run' is not subject"),
    ({"pos_triplet": "[man,"}, "no triplet", "is no list of triplets"),
    ({"neg_triplet": "woman,run,lake"}, "triplets differ in something else", "subject and object"),
    ({"neg_triplet": "man,run,sea"}, "triplets differ in something else", "differ in nothing"),
    ({"verb_neg": "True"}, "does not say what differs", "one of .* must be True"),
    ({"subj_neg": "yes"}, "does not say what differs", "one of .* must be True"),
    ({"pos_url": ""}, "not two URLs", "the photographs are ''"),
    ({"neg_url": SVO[0]["pos_url"]}, "not two URLs", "the photographs are"),
    ({"pos_url": "https://example.org/"}, "URL without a file name", "give files="),
    ({"pos_url": "https://example.org/none.jpg"}, "image not there", "none.jpg' is not there"),
    ({"pos_url": "https://example.org/broken.jpg"}, "unreadable image", "no image that can be"),
    ({"pos_url": "https://example.org/cut.jpg"}, "unreadable image", "no image that can be read"),
    ({"pos_url": "https://example.org/black.jpg"}, "image of a single colour", "single colour"),
    ({"neg_url": "https://x.org/d.jpg"}, "several URLs of one file name", "2 URLs end in 'd.jpg'"),
    ({"pos_triplet": "sea,run,man", "neg_triplet": "man,run,man"}, "option named twice", "2 times"),
]


@pytest.mark.parametrize(("wrong", "reason", "says"), BAD_SVO)
def test_bad_lines_of_svo_probes(svo, wrong, reason, says):
    whole = draw(svo / "images" / "cut.jpg").read_bytes()
    (svo / "images" / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (svo / "images" / "broken.jpg").write_bytes(b"404 not found")
    Image.new("RGB", (8, 8)).save(svo / "images" / "black.jpg")
    table = write(svo / "svo_probes.csv", [SVO[1], {**SVO[0], **wrong}, SVO[2]])
    with pytest.raises(ValueError, match=rf"svo_probes\.csv, line .*: .*{says}.*; {LEFT_OUT}"):
        read_svo_probes(table, svo / "images", seed=0)
    choices = read_svo_probes(table, svo / "images", seed=0, on_bad="drop")
    lost = 4 if "several" in reason else 2  # the other line with a URL of that name, too
    assert choices.report.dropped == {reason: lost}
    assert [one.name for one in choices if one.name[0] in "24"] == [one.name for one in choices]
    assert len(choices) == 6 - lost


def test_svo_probes_leaves_out_words_and_repetitions(svo):
    person = line("person,run,sea", "personal,run,sea", "a.jpg", "b.jpg", "subj_neg")
    table = write(svo / "svo_probes.csv", [*SVO, person, {**SVO[0], "sentence": "Another."}])
    with pytest.raises(ValueError, match=r"line 6, .*asks the same of the same as line 2"):
        read_svo_probes(table, svo / "images", seed=0)
    choices = read_svo_probes(table, svo / "images", seed=0, on_bad="drop")
    assert choices.report.dropped == {"has the word 'person'": 2, "duplicate": 2}
    assert "personal" in choices.vocabularies["subject"].words  # another word
    assert "person" not in choices.vocabularies["subject"].words
    kept = read_svo_probes(table, svo / "images", seed=0, on_bad="drop", exclude=())
    assert len(kept) == 8


def test_svo_probes_finds_files_by_a_list(svo):
    table = write(svo / "svo_probes.csv", SVO)
    urls = [one[f"{side}_url"] for one in SVO for side in ("pos", "neg")]
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        draw(svo / "other" / name, number)
    listed = dict(zip(urls, names, strict=True))
    (svo / "files.json").write_text(json.dumps(listed))
    write(svo / "files.csv", [{"url": url, "file": name} for url, name in listed.items()])
    for files in ("files.json", "files.csv"):
        choices = read_svo_probes(table, svo / "other", seed=0, files=svo / files)
        assert [one.image.name for one in choices] == [listed[url] for url in urls]
    del listed[urls[0]]
    (svo / "files.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"line 2, .*the list of files has no 'https"):
        read_svo_probes(table, svo / "other", seed=0, files=svo / "files.json")
    for name, text, says in [
        ("no.json", "{", "no.json is no JSON"),
        ("no.json", '["a"]', "no.json is no JSON object of file names by URL"),
        ("no.csv", "url,file\na,\n", "no.csv, line 2: url or file missing"),
        ("no.csv", "url,file\na,b\na,c\n", "no.csv, line 3: another file for 'a'"),
        ("no.csv", "url,file\n", "no.csv is empty"),
        ("no.csv", "url,name\n", "no.csv has no column 'file'; it has 'url', 'name'"),
    ]:
        (svo / name).write_text(text)
        with pytest.raises(ValueError, match=says):
            read_svo_probes(table, svo / "other", seed=0, files=svo / name)


def test_svo_probes_takes_rewritten_prompts(svo):
    table, prompts = write(svo / "svo_probes.csv", SVO), svo / "prompts.csv"
    told = {
        "is man or woman run sea?": "Is the man or woman running in the sea",
        "is dog sit or lie lawn?": "Is the dog sitting or lying on the lawn?",
        "is girl eat cake or apple?": "Is the girl eating cake or apple ?",
    }

    def rewrite(**changes):
        lines = {**told, **{next(k for k in told if key in k): v for key, v in changes.items()}}
        rows = [{"prompt_before": k, "prompt_after": v} for k, v in lines.items() if v]
        write(prompts, rows[::-1])  # each belongs to its question, not to its place
        return read_svo_probes(table, svo / "images", seed=0, prompts=prompts, on_bad="drop")

    choices = rewrite()
    assert [(one.text, one.answer, one.foil) for one in choices][::2] == [
        ("Is the man or woman running in the sea?", "man", "woman"),
        ("Is the dog sitting or lying on the lawn?", "sitting", "lying"),
        ("Is the girl eating cake or apple?", "cake", "apple"),
    ]
    assert choices[0].roles == {"verb": "running", "object": "sea"}
    assert choices[2].vocabulary == "verb, -ing"
    words = choices.vocabularies["verb, -ing"].words
    assert words == ("eating", "lying", "running", "sitting")
    for changes, reason in [
        ({"man": None}, "not rewritten"),
        ({"man": "Is he running in the sea?"}, "option lost"),
        ({"dog": "Does the dog sit, or is it lying?"}, "options of two forms"),
    ]:
        assert rewrite(**changes).report.dropped == {reason: 2}


def test_the_ing_form():
    told = {
        "run": "running", "ride": "riding", "lie": "lying", "see": "seeing", "dye": "dyeing",
        "play": "playing", "fix": "fixing", "eat": "eating", "stand": "standing", "hug": "hugging",
        "throw": "throwing", "be": "being", "argue": "arguing", "dress": "dressing",
    }  # fmt: skip
    assert {verb: ing_form(verb) for verb in told} == told


def test_files_that_are_no_svo_probes(svo):
    (svo / "images").mkdir(exist_ok=True)
    short = [{key: value for key, value in one.items() if key != "neg_url"} for one in SVO]
    for name, text, says in [
        ("a.csv", "", "has no column 'pos_triplet', .*; it is empty"),
        ("b.csv", ",".join(SVO[0]) + "\n", "b.csv holds no choices$"),
        ("c.csv", None, "c.csv has no column 'neg_url'; it has 'sentence', 'pos_triplet'"),
        ("d.csv", ",".join([*SVO[0], "pos_url"]) + "\n", "has the column 'pos_url' twice"),
        ("e.txt", "", "is neither .csv nor .jsonl"),
    ]:
        file = write(svo / name, short) if text is None else svo / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_svo_probes(file, svo / "images", seed=0)
    table = write(svo / "svo_probes.csv", [{**SVO[0], "subj_neg": ""}])
    with pytest.raises(ValueError, match=r"holds no choices that can be used: kept 0 of 2 rows"):
        read_svo_probes(table, svo / "images", seed=0, on_bad="drop")
    with pytest.raises(FileNotFoundError, match=r"no folder of images '.*absent'"):
        read_svo_probes(table, svo / "absent", seed=0)
