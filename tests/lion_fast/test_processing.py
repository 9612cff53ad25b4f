"""The processor: tensors equal to the original's, support of every language model, and errors that name their cause.

transformers tests its own processors with a suite that is not part of its package. What it checks, and where it is
checked here:

- settings saved and loaded, and as JSON: `test_settings_are_saved_and_loaded`, `test_the_configuration_is_json`
- images alone, text alone, both, neither; `model_input_names`: `test_images_alone_are_processed_alone`,
  `test_questions_may_come_without_images`, `test_errors_name_the_argument`, `test_return_tensors_selects_the_type`
- decoding by the tokenizer: `test_generated_ids_decode_to_the_originals_text`
- arguments given flat, in groups, twice or unknown; settings of the image processor kept and overridden:
  `test_settings_may_come_in_groups`, `test_the_image_processor_takes_its_settings`, `test_errors_name_the_argument`
- chats, single and in batches, with images of every kind: `test_a_chat_is_the_question_about_its_image`

Not applicable: defaults for `padding` and `max_length` saved in a tokenizer (LION's are the original's, whatever the
tokenizer was last used for); a chat template saved with the processor (the file's name is the tokenizer's own, which
keeps it); prefilled answers, masks of the assistant's tokens, numbers of image tokens (no token stands for the image);
audio and video.
"""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BlipImageProcessorPil, LlamaConfig, PreTrainedTokenizerFast, T5Config

from lion_fast.processing_lion import LionProcessor, build_processor

QUESTION = "What is on the cart?"
SENTENCE = "According to <extra_id_0>, you are allowed to use or partially use the following tags: [dog, cart]. "
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def byte_tokenizer(template: str = "$A", **special_tokens: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, so that ids decode to the original text, and with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens.values()))
    ids = [(token, tokenizer.token_to_id(token)) for token in special_tokens.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer("$A </s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens(["<extra_id_0>"], special_tokens=True)
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")


DECODERS = {"llama": llama_tokenizer, "qwen": qwen_tokenizer}


def make_processor(tokenizer: PreTrainedTokenizerFast | None = None, **settings) -> LionProcessor:
    bert = byte_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    return LionProcessor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer or t5_tokenizer(), bert, **settings
    )


def processor_of(kind: str) -> LionProcessor:
    """Make a processor for T5 or one of `DECODERS`."""
    return make_processor() if kind == "t5" else make_processor(DECODERS[kind](), is_encoder_decoder=False)


@pytest.fixture
def processor() -> LionProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def golden_processor(golden) -> LionProcessor:
    return build_processor(golden.directory / "flan-t5-tiny", golden.directory / "bert-tiny", image_size=56)


@pytest.mark.parametrize("size", [56, 224])
def test_pixels_are_bit_equal_to_the_originals(golden, size):
    processor = build_processor(golden.directory / "flan-t5-tiny", golden.directory / "bert-tiny", size)
    pixels = processor(golden.directory / "image.png", QUESTION).pixel_values
    assert torch.equal(pixels[0], golden.expected[f"image.eval_processor_{size}"])


def test_dec_is_the_last_token_of_the_q_formers_vocabulary(golden, golden_processor):
    state = torch.load(golden.directory / "LION-tiny.pth", weights_only=True)["model"]
    rows = len(state["Qformer.bert.embeddings.word_embeddings.weight"])
    assert len(golden_processor.qformer_tokenizer) == rows
    assert golden_processor.qformer_tokenizer.convert_tokens_to_ids("[DEC]") == rows - 1


def test_a_used_processor_can_be_saved_and_loaded(golden, golden_processor, tmp_path):
    images, questions = [golden.directory / "image.png"] * 4, golden.meta["questions"]
    given = {"tags": golden.meta["tags"], "text_target": golden.meta["answers"]}
    before = golden_processor(images, questions, **given)
    golden_processor.save_pretrained(tmp_path)
    loaded = LionProcessor.from_pretrained(tmp_path)
    after = loaded(images, questions, **given)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.image_processor.backend == "pil"
    long_question = "Is there a dog in the image? " * 30
    prompts = [p(IMAGE, long_question).input_ids for p in (golden_processor, loaded)]
    assert prompts[0].shape[1] > golden_processor.max_txt_len
    assert torch.equal(*prompts)


def test_saved_files_do_not_depend_on_earlier_calls(tmp_path):
    fresh, used = processor_of("t5"), processor_of("t5")
    used(text=["a question", "what"], padding=True, truncation=True, max_length=8)
    for name, each in (("fresh", fresh), ("used", used)):
        each.save_pretrained(tmp_path / name)
    for file in (tmp_path / "fresh").rglob("*.json"):
        assert file.read_bytes() == (tmp_path / "used" / file.relative_to(tmp_path / "fresh")).read_bytes()


def test_generated_ids_decode_to_the_originals_text(golden, golden_processor):
    name = "region_level.generate.beams5.rp1.5"
    decoded = golden_processor.batch_decode(golden.expected[name], skip_special_tokens=True)
    assert decoded == golden.meta[name]
    assert golden_processor.decode(golden.expected[name][0], skip_special_tokens=True) == golden.meta[name][0]
    assert golden_processor.post_process_image_text_to_text(golden.expected[name]) == golden.meta[name]


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        *(
            (tags, SENTENCE)
            for tags in ("dog, cart", ["dog", "cart"], ["dog, cart"], [["dog", "cart"]], ("dog", "cart"))
        ),
        *((tags, "") for tags in (None, "", " ", [], [""], [None], [[]])),
        ("{tags}, [x]", SENTENCE.replace("dog, cart", "{tags}, [x]")),
    ],
)
def test_the_prompt_is_the_sentence_of_the_tags_and_the_question(processor, tags, sentence):
    (ids,) = processor(IMAGE, QUESTION, tags=tags).input_ids
    assert processor.decode(ids) == sentence + QUESTION + "</s>"
    assert (ids == processor.soft_prompt_token_id).sum() == bool(sentence)


def test_each_sample_has_its_own_tags(processor):
    batch = processor([IMAGE] * 4, [QUESTION] * 4, tags=["dog, cart", None, ["dog", "cart"], ""])
    texts = processor.batch_decode(batch.input_ids, skip_special_tokens=True)
    expected = [SENTENCE.replace("<extra_id_0>", "") + QUESTION, QUESTION]
    assert texts == expected * 2


def test_the_q_former_reads_the_question_alone(processor):
    batch = processor([IMAGE] * 2, [QUESTION, "Why?"], tags=["dog", "cat"])
    texts = processor.qformer_tokenizer.batch_decode(batch.qformer_input_ids)
    pads = len(QUESTION) - len("Why?")
    assert texts == [f"[CLS]{QUESTION}[SEP]", "[CLS]Why?[SEP]" + "[PAD]" * pads]
    assert batch.qformer_attention_mask.sum(1).tolist() == [len(QUESTION) + 2, len("Why?") + 2]


def test_questions_may_come_without_images(processor):
    whole = processor([IMAGE] * 2, [QUESTION, "Why?"], tags=["dog", None])
    alone = processor(None, [QUESTION, "Why?"], tags=["dog", None])
    assert alone.keys() == whole.keys() - {"pixel_values"}
    assert all(torch.equal(value, whole[name]) for name, value in alone.items())


@pytest.mark.parametrize(
    ("task", "ids"),
    [
        ({}, [1, 1]),
        ({"task": "image_level"}, [1, 1]),
        ({"task": "region_level"}, [0, 0]),
        ({"task": ["region_level", "image_level"]}, [0, 1]),
    ],
)
def test_tasks_become_ids(processor, task, ids):
    batch = processor([IMAGE] * 2, [QUESTION] * 2, **task)
    assert batch.task_ids.tolist() == ids
    assert batch.task_ids.dtype == torch.int64


LONG = "".join(chr(ord("a") + i % 26) for i in range(150))


@pytest.mark.parametrize(
    ("answer", "prompt"), [(None, f"{SENTENCE}{LONG}</s>"), ("yes", f"{LONG[-127:]}</s>")], ids=["question", "training"]
)
def test_only_training_prompts_are_truncated_on_the_left_and_keep_eos(processor, answer, prompt):
    """The Q-Former's question always is."""
    batch = processor(IMAGE, LONG, tags="dog, cart", text_target=answer)
    assert processor.decode(batch.input_ids[0]) == prompt
    assert processor.qformer_tokenizer.decode(batch.qformer_input_ids[0]) == f"[CLS]{LONG[-126:]}[SEP]"


@pytest.mark.parametrize("kind", ["t5", *DECODERS])
def test_labels_are_the_answer_and_eos(kind):
    processor = processor_of(kind)
    answers = ["a red one", "", "x" * 200, "<extra_id_0> dog"]
    labels = processor([IMAGE] * 4, [QUESTION] * 4, text_target=answers).labels
    assert labels.shape == (4, 128)
    assert labels.dtype == torch.int64
    eos = processor.tokenizer.eos_token
    for row, text in zip(labels, ["a red one", "", "x" * 127, "<extra_id_0> dog"], strict=True):
        length = len(processor.tokenizer.tokenize(text)) + 1
        assert processor.decode(row[:length]) == text + eos
        assert (row[length:] == -100).all()
    texts = ["a red one", "", "x" * 127, "<extra_id_0> dog"]
    for given in (labels, labels.numpy(), labels.tolist()):
        assert processor.batch_decode(given) == [text + eos for text in texts]
        assert processor.decode(given[0]) == texts[0] + eos


@pytest.mark.parametrize("kind", ["t5", *DECODERS])
def test_decoder_only_prompts_are_padded_on_the_left(kind):
    processor = processor_of(kind)
    batch = processor([IMAGE] * 2, ["Why?", QUESTION])
    short, long = (int(mask.sum()) for mask in batch.attention_mask)
    row = [0] * (long - short) + [1] * short
    assert batch.attention_mask[0].tolist() == (row[::-1] if kind == "t5" else row)
    prompts = [
        processor.decode(ids[mask.bool()]) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    before, after = {"t5": ("", "</s>"), "llama": ("<s>", ""), "qwen": ("", "")}[kind]
    assert prompts == [before + "Why?" + after, before + QUESTION + after]


@pytest.mark.parametrize(
    ("tokenizer", "pad_token"), [(llama_tokenizer, "</s>"), (qwen_tokenizer, "<|endoftext|>")], ids=["without", "own"]
)
def test_a_tokenizer_without_padding_pads_with_eos(tokenizer, pad_token):
    assert make_processor(tokenizer(), is_encoder_decoder=False).tokenizer.pad_token == pad_token


@pytest.mark.parametrize(
    ("tokenizer", "question", "answer", "prompt"),
    [
        (llama_tokenizer(), "a" * 100 + "b" * 127, "yes", "<s>" + "b" * 127),
        (byte_tokenizer("</s> $A", eos_token="</s>"), "Why?", None, "</s>Why?"),
    ],
    ids=["truncated", "BOS is EOS"],
)
def test_a_decoder_only_prompt_keeps_bos(tokenizer, question, answer, prompt):
    processor = make_processor(tokenizer, is_encoder_decoder=False)
    assert processor.decode(processor(IMAGE, question, text_target=answer).input_ids[0]) == prompt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer": t5_tokenizer(), "is_encoder_decoder": False},
            "got '</s>' at their end; load it with add_eos_token=False",
        ),
        ({"tokenizer": byte_tokenizer(pad_token="<pad>")}, "tokenizer: expected one with an EOS token"),
        ({"max_txt_len": 0}, "max_txt_len: expected 1 or more, got 0"),
        ({"max_target_len": 0}, "max_target_len: expected 1 or more, got 0"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"images": IMAGE, "text": ["a", "b"]}, ValueError, "text: expected one question per image, got 2 for 1"),
        ({"images": [IMAGE] * 2, "text": "a"}, ValueError, "got 1 for 2 images"),
        ({"images": [IMAGE, "no.png"], "text": ["a", "b"]}, FileNotFoundError, r"images\[1\] \(no\.png\)"),
        ({"images": [], "text": []}, ValueError, "images: expected at least one image"),
        ({"images": None, "text": None}, ValueError, "images: expected images, text or both, got neither"),
        ({"images": None, "text": []}, ValueError, "text: expected at least one question, got none"),
        ({"text": None, "tags": "dog"}, ValueError, "tags: expected None without text, got str"),
        ({"images": [[IMAGE, IMAGE]]}, ValueError, r"images\[0\]: expected one image for each of 1 texts, got 2"),
        ({"text": b"Why?"}, TypeError, "text: expected a string or a list of strings, got bytes"),
        ({"text": "Why \ud83d?"}, ValueError, r"text\[0\]: expected text that UTF-8 can hold"),
        ({"text": [None]}, TypeError, r"text\[0\]: expected a string, got NoneType"),
        ({"text": " \n"}, ValueError, r"text\[0\]: expected a question"),
        ({"text": "Is <extra_id_0> here?"}, ValueError, r"text\[0\]: expected text without '<extra_id_0>'"),
        ({"tags": "dog, <extra_id_0>"}, ValueError, r"tags\[0\]: expected text without '<extra_id_0>'"),
        ({"tags": 3}, TypeError, "tags: expected None, a string, a list with one entry per image"),
        ({"tags": [3]}, TypeError, r"tags\[0\]: expected a string or a list of strings, got int"),
        ({"text": ["a"], "tags": ["dog", "cat"]}, ValueError, r"tags: expected one per image \(1\), got 2"),
        ({"task": "caption"}, ValueError, "task: expected 'region_level' or 'image_level', got 'caption'"),
        ({"task": ["image_level"] * 2}, ValueError, r"task: expected one per image \(1\), got 2"),
        ({"task": 1}, TypeError, "task: expected a string or a list of strings, got int"),
        ({"text_target": ["a", "b"]}, ValueError, r"text_target: expected one per image \(1\), got 2"),
        ({"text_target": [None]}, TypeError, r"text_target\[0\]: expected a string, got NoneType"),
        ({"padding": "none"}, ValueError, "padding: expected one of True, 'longest', .*, got 'none'"),
        ({"padding": 1}, ValueError, "padding: expected one of .*, got 1"),
        ({"truncation": "only_second"}, ValueError, "truncation: expected one of .*, got 'only_second'"),
        ({"max_length": 0}, ValueError, "max_length: expected a whole number of 1 or more, got 0"),
        ({"max_length": True}, ValueError, "max_length: expected a whole number of 1 or more, got True"),
        ({"padding_side": "top"}, ValueError, "padding_side: expected 'left' or 'right', got 'top'"),
        ({"return_tensors": "tf"}, ValueError, "return_tensors: expected 'pt', 'np' or None, got 'tf'"),
        ({"text_kwargs": [1]}, TypeError, "text_kwargs: expected a dict of arguments, got list"),
        ({"text_kwargs": {"size": 3}}, TypeError, r"text_kwargs\['size'\]: unexpected argument"),
        ({"colour": "red"}, TypeError, "colour: unexpected argument; expected some of add_special_tokens, "),
        ({"padding": True, "text_kwargs": {"padding": False}}, ValueError, "padding: expected it once, got it as an"),
        ({"videos": [IMAGE]}, ValueError, "videos: expected none, because LION reads images and text"),
        ({"image_mean": float("nan")}, ValueError, r"images_kwargs: .* \(the pixels are not finite\)"),
        ({"size": {"height": 10**6, "width": 28}}, ValueError, r"size: expected sides in 1\.\.4096 pixels, got"),
        ({"images_kwargs": {"crop_size": 10**6}}, ValueError, r"crop_size: expected sides in 1\.\.4096 pixels, got"),
        ({"data_format": "channels_last"}, ValueError, "data_format: expected 'channels_first'"),
        ({"size": "large"}, ValueError, "images_kwargs: expected settings that BlipImageProcessorPil takes"),
        (
            {"images": [IMAGE] * 2, "text": ["a", "bcd"], "padding": False},
            ValueError,
            "padding: expected True, .* for return_tensors='pt', got False with input_ids of 2 to 4 tokens",
        ),
        (
            {"images": None, "text": ["a" * 200, "b"], "padding": "max_length"},
            ValueError,
            "padding: .* 'max_length' with truncation=True, .*, got 'max_length' with input_ids of 128 to 201 tokens",
        ),
        ({"allow_urls": "no"}, TypeError, "allow_urls: expected True or False, got 'no'"),
        (
            {"tags": lambda images: 3},
            ValueError,
            "tags: expected one entry from the tagger for each of 1 images, got 3",
        ),
        ({"padding": "x" * 9999}, ValueError, "^padding: .{0,300}$"),
        ({"videos": torch.zeros(2, 2)}, ValueError, "^videos: .*$"),
    ],
)
def test_errors_name_the_argument(processor, call, error, message):
    with pytest.raises(error, match=message):
        processor(**{"images": IMAGE, "text": QUESTION, **call})


def image_file() -> io.BytesIO:
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    return file


@pytest.mark.parametrize(
    "image",
    [
        image_file(),  # at its end
        {"bytes": image_file().getvalue(), "path": None},
        {"bytes": image_file().getvalue(), "path": "no/such/file.png"},
        "data:image/png;base64," + base64.b64encode(image_file().getvalue()).decode(),
    ],
    ids=["open file", "row of a data set", "row with a path", "data URI"],
)
def test_an_image_may_be_what_other_libraries_hand_over(processor, image):
    pixels = processor(IMAGE, QUESTION).pixel_values
    assert torch.equal(processor(image, QUESTION).pixel_values, pixels)
    assert torch.equal(processor([image], QUESTION).pixel_values, pixels)
    assert torch.equal(processor([[image]], [QUESTION]).pixel_values, pixels)


def test_a_row_of_a_data_set_may_hold_a_path(processor, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    row = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert torch.equal(processor(row, QUESTION).pixel_values, processor(IMAGE, QUESTION).pixel_values)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("https://example.org/a.png", ValueError, "got the URL .*; nothing is downloaded unless .* allow_urls=True"),
        ("data:image/png,abc", ValueError, "images: expected data:image/...;base64,..., got 'data:image/png,abc'"),
        ("data:image/png;base64,????", ValueError, "images: expected base64, got '\\?"),
        ({"bytes": None, "path": None}, ValueError, "images: expected a dict with 'bytes' or 'path', got neither"),
        ({"image": IMAGE}, TypeError, "images: expected a dict of 'bytes' and 'path', got one with image"),
        ({"bytes": "abc"}, TypeError, r"images\['bytes'\]: expected bytes, got str"),
        (io.StringIO("abc"), TypeError, "images: expected a file opened in binary mode, got one that reads str"),
    ],
)
def test_an_image_from_elsewhere_that_is_none_is_named(processor, image, error, message):
    with pytest.raises(error, match=message):
        processor(image, QUESTION)


class OneImage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = image_file().getvalue()
        self.send_response(200 if self.path == "/a.png" else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_urls_are_downloaded_only_when_allowed(processor):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneImage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match="nothing is downloaded"):
            processor(f"{url}/a.png", QUESTION)
        pixels = processor([f"{url}/a.png"], QUESTION, allow_urls=True).pixel_values
        assert torch.equal(pixels, processor(IMAGE, QUESTION).pixel_values)
        with pytest.raises(ValueError, match=r"images: expected an image at .*/b\.png, got HTTP status 404"):
            processor(f"{url}/b.png", QUESTION, allow_urls=True)
        server.shutdown()
    with pytest.raises(OSError, match="images: no answer from http://127"):
        processor(f"{url}/a.png", QUESTION, allow_urls=True)


def test_images_alone_are_processed_alone(processor):
    alone = processor([IMAGE] * 2)
    assert alone.keys() == {"pixel_values"}
    assert torch.equal(alone.pixel_values, processor([IMAGE] * 2, [QUESTION] * 2).pixel_values)


@pytest.mark.parametrize("kind", ["t5", *DECODERS])
def test_padding_and_truncation_are_those_of_transformers(kind):
    processor = processor_of(kind)
    texts = ["Why?", QUESTION]
    plain = processor(None, texts)
    padded = processor(None, texts, padding="max_length", max_length=40, truncation=True)
    assert padded.input_ids.shape == padded.qformer_input_ids.shape == (2, 40)
    assert torch.equal(padded.attention_mask.sum(1), plain.attention_mask.sum(1))
    assert processor(None, texts, padding="max_length").input_ids.shape == (2, processor.max_txt_len)
    assert processor(None, texts, max_length=9).input_ids.shape == (2, 9)
    assert processor(None, texts, pad_to_multiple_of=32).input_ids.shape == (2, 32)
    unpadded = processor(None, texts, padding=False, return_tensors=None)
    assert [len(ids) for ids in unpadded["input_ids"]] == plain.attention_mask.sum(1).tolist()
    long = [LONG * 2]
    assert processor(None, long, text_target=["a"], truncation=False).input_ids.shape[1] >= 300
    assert processor(None, long, truncation=True).input_ids.shape == (1, 128)
    sides = processor(None, texts, padding_side="left").attention_mask
    assert sides[0, 0] == 0
    assert sides[0, -1] == 1


@pytest.mark.parametrize("group", ["text_kwargs", "common_kwargs"])
def test_settings_may_come_in_groups(processor, group):
    flat = processor(IMAGE, QUESTION, padding="max_length", max_length=40, return_tensors="np")
    grouped = processor(IMAGE, QUESTION, **{group: {"padding": "max_length", "max_length": 40, "return_tensors": "np"}})
    assert flat.keys() == grouped.keys()
    assert all(np.array_equal(flat[name], grouped[name]) for name in flat)


def test_the_image_processor_takes_its_settings(processor):
    for settings in ({"size": {"height": 14, "width": 14}}, {"images_kwargs": {"size": {"height": 14, "width": 14}}}):
        assert processor(IMAGE, QUESTION, **settings).pixel_values.shape == (1, 3, 14, 14)
    unscaled = processor(IMAGE, QUESTION, do_rescale=False, do_normalize=False).pixel_values
    assert unscaled.max() > 1


CHAT = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}]}]


def test_a_chat_is_the_question_about_its_image(processor):
    expected = processor(IMAGE, QUESTION, task="region_level", tags="dog")
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(CHAT, **asked, task="region_level", tags="dog", add_generation_prompt=True)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    encoded = base64.b64encode(image_file().getvalue()).decode()
    for image in ({"url": f"data:image/png;base64,{encoded}"}, {"base64": encoded}):
        chat = [{"role": "user", "content": [{"type": "image", **image}, *CHAT[0]["content"][1:]]}]
        several = processor.apply_chat_template([chat, CHAT], **asked)
        assert torch.equal(several.pixel_values, expected.pixel_values.expand(2, -1, -1, -1))
    assert processor.apply_chat_template(CHAT) == QUESTION
    turns = [*CHAT, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "Is it {{ 3 }}?"}]
    assert processor.apply_chat_template(turns) == f"{QUESTION}\na dog\nIs it {{{{ 3 }}}}?"


@pytest.mark.parametrize(
    ("chat", "error", "message"),
    [
        ([], TypeError, r"conversation: expected a list of messages, got \[\]"),
        ("Why?", TypeError, "conversation: expected a list of messages, got 'Why\\?'"),
        ([[]], TypeError, r"conversation\[0\]: expected a list of messages, got \[\]"),
        ([{"role": "user"}], TypeError, r"conversation\[0\]: expected a dict of 'role' and 'content'"),
        ([{"content": "Why?"}], TypeError, r"conversation\[0\]: expected a dict of 'role' and 'content'"),
        ([{"role": "user", "content": ["Why?"]}], TypeError, "text or a list of dicts with 'type', got"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, "expected a key 'text' with a string"),
        (
            [{"role": "user", "content": [{"type": "table"}, *CHAT[0]["content"]]}],
            ValueError,
            r"conversation\[0\]\.content\[0\]\.type: expected 'text' or 'image', got 'table'",
        ),
        ([*CHAT, {"role": "assistant", "content": "a"}], ValueError, "conversation: expected a question last, because"),
        ([*CHAT, *CHAT], ValueError, r"images\[0\]: expected one image for each of 1 texts, got 2"),
        ([{"role": "user", "content": CHAT[0]["content"][:1]}], ValueError, r"text\[0\]: expected a question"),
    ],
)
def test_a_chat_that_is_none_is_named(processor, chat, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


def test_a_chat_has_no_mask_of_answers(processor):
    with pytest.raises(ValueError, match="return_assistant_tokens_mask: expected False"):
        processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)


def test_the_processor_parses_and_draws_boxes(processor):
    boxes = processor.parse_boxes("[0.250,0.250,0.750,0.750]", image_size=(40, 40))
    assert processor.draw_boxes(Image.new("RGB", (40, 40)), boxes).getpixel((10, 20)) != (0, 0, 0)


@pytest.mark.parametrize("token", ["<hint>", None])
def test_tags_need_a_token_for_the_soft_prompt(token):
    processor = make_processor(soft_prompt_token=token)
    assert processor.soft_prompt_token_id is None
    with pytest.raises(
        ValueError, match=r"tags\[1\]: expected none, as the tokenizer has no token for the soft prompt"
    ):
        processor([IMAGE] * 2, [QUESTION] * 2, tags=[None, "dog"])
    assert processor(IMAGE, QUESTION, tags=None).input_ids.shape[0] == 1


def test_an_image_processor_of_another_backend_is_replaced():
    class OtherBackend(BlipImageProcessorPil):
        backend = "torchvision"

    settings = {"size": {"height": 14, "width": 28}, "image_mean": [0.1, 0.2, 0.3]}
    processor = LionProcessor(OtherBackend(**settings), t5_tokenizer(), t5_tokenizer())
    assert type(processor.image_processor) is BlipImageProcessorPil
    assert list(processor.image_processor.image_mean) == settings["image_mean"]
    assert processor(IMAGE, QUESTION).pixel_values.shape == (1, 3, 14, 28)


def test_return_tensors_selects_the_type(processor):
    tensors = processor(IMAGE, QUESTION)
    assert sorted(tensors) == sorted(processor.model_input_names)
    arrays = processor(IMAGE, QUESTION, return_tensors="np")
    lists = processor(IMAGE, QUESTION, return_tensors=None)
    for name, tensor in tensors.items():
        assert np.array_equal(arrays[name], tensor.numpy())
        assert np.array_equal(np.array(lists[name]), tensor.numpy())


def test_settings_are_saved_and_loaded(tmp_path):
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["<hint>"], special_tokens=True)
    settings = {"is_encoder_decoder": False, "soft_prompt_token": "<hint>", "max_txt_len": 9, "max_target_len": 7}
    saved = make_processor(tokenizer, **settings)
    saved.save_pretrained(tmp_path)
    loaded = LionProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.soft_prompt_token_id == saved.soft_prompt_token_id is not None
    calls = [p([IMAGE] * 2, ["Why?", QUESTION], tags=["a", "b"], text_target=["c", "d"]) for p in (saved, loaded)]
    assert all(torch.equal(calls[0][name], calls[1][name]) for name in calls[0])
    assert calls[0].input_ids.shape == (2, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_txt_len": "9"}, "max_txt_len: expected a whole number in 1..1048576, got '9'"),
        ({"is_encoder_decoder": "no"}, "is_encoder_decoder: expected true or false, got 'no'"),
        ({"size": {"height": 10**6, "width": 28}}, "size: expected height and width, whole numbers in 1..4096, got"),
    ],
)
def test_settings_that_replace_the_saved_ones_are_checked(processor, tmp_path, settings, message):
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        LionProcessor.from_pretrained(tmp_path, **settings)


def test_the_configuration_is_json(processor):
    settings = json.loads(processor.to_json_string())
    assert settings["processor_class"] == "LionProcessor"
    assert settings["max_txt_len"] == 128


def test_settings_of_the_image_processor_are_kept(processor):
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28}, rescale_factor=-1)
    negative = LionProcessor(image_processor, processor.tokenizer, processor.qformer_tokenizer)
    assert negative(IMAGE, QUESTION).pixel_values.mean() < 0
    assert negative(IMAGE, QUESTION, rescale_factor=1 / 255).pixel_values.mean() > -1


@pytest.mark.parametrize(
    ("tokenizer", "config", "is_encoder_decoder"),
    [(t5_tokenizer, T5Config(), True), (llama_tokenizer, LlamaConfig(), False)],
    ids=["t5", "llama"],
)
def test_build_processor_supports_both_kinds_of_language_model(tmp_path, tokenizer, config, is_encoder_decoder):
    llm = tokenizer()
    bert = byte_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    llm.save_pretrained(tmp_path / "llm")
    bert.save_pretrained(tmp_path / "bert")
    config.save_pretrained(tmp_path / "llm")
    processor = build_processor(tmp_path / "llm", tmp_path / "bert", image_size=42)
    assert processor.is_encoder_decoder is is_encoder_decoder
    assert processor.qformer_tokenizer.bos_token_id == len(bert)
    if is_encoder_decoder:
        assert len(processor.tokenizer) == len(llm)
    else:
        assert processor.soft_prompt_token_id == len(llm)  # the first free id
    (ids,) = processor(IMAGE, QUESTION, tags="dog, cart").input_ids
    prefix, suffix = ("", "</s>") if is_encoder_decoder else ("<s>", "")
    assert processor.decode(ids) == prefix + SENTENCE + QUESTION + suffix
    assert processor(IMAGE, QUESTION).pixel_values.shape == (1, 3, 42, 42)


@pytest.mark.parametrize(("llm", "bert", "name"), [("nowhere", ".", "llm_dir"), (".", "nowhere", "bert_dir")])
def test_missing_directories_are_named(tmp_path, llm, bert, name):
    with pytest.raises(NotADirectoryError, match=f"{name}: expected a directory with a tokenizer, got .*nowhere"):
        build_processor(tmp_path / llm, tmp_path / bert)
