"""The command line, run as `main()` runs it: what goes to which stream, and that a mistake is one line."""

from __future__ import annotations

import json
import json.decoder
import sys
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from tests.cli.conftest import Shoal, refusal


def test_score_is_the_log_probability_of_the_model(shoal: Shoal, checkpoint: Path) -> None:
    ids = [5, 9, 300, 17, 42, 9]
    result = json.loads(shoal("score", checkpoint, "--ids", "5,9,300,17,42,9", "--json").out)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    assert result["ids"] == ids
    assert result["logprobs"][0] is None
    # Two float32 forward passes differ by rounding, some 1e-6 of logits that reach about 10.
    torch.testing.assert_close(torch.tensor(result["logprobs"][1:]), expected, atol=1e-4, rtol=0)
    assert result["sum"] == pytest.approx(sum(result["logprobs"][1:]))


def test_greedy_generation_is_what_scoring_ranks_first(shoal: Shoal, checkpoint: Path) -> None:
    made = json.loads(
        shoal("generate", checkpoint, "def", "--max-tokens", "8", "--temperature", "0", "--json").out
    )
    everything = ",".join(map(str, made["prompt_ids"] + made["ids"]))
    scored = json.loads(shoal("score", checkpoint, "--ids", everything, "--json").out)
    assert len(made["ids"]) == 8 or made["finish_reason"] == "stop"
    torch.testing.assert_close(
        torch.tensor(made["logprobs"]),
        torch.tensor(scored["logprobs"][len(made["prompt_ids"]) :]),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("quant", ["fp8", "int4"])
def test_a_model_answers_quantised(shoal: Shoal, checkpoint: Path, quant: str) -> None:
    """Greedy tokens are those that scoring the same narrow weights ranks; other weights score otherwise."""
    made = json.loads(
        shoal(
            "generate",
            checkpoint,
            "def",
            "--max-tokens",
            "6",
            "--temperature",
            "0",
            "--quant",
            quant,
            "--json",
        ).out
    )
    everything = ",".join(map(str, made["prompt_ids"] + made["ids"]))
    scores = [
        torch.tensor(
            json.loads(shoal("score", checkpoint, "--ids", everything, *how, "--json").out)["logprobs"][1:]
        )
        for how in (("--quant", quant), ())
    ]
    narrow = scores[0][len(made["prompt_ids"]) - 1 :]
    torch.testing.assert_close(torch.tensor(made["logprobs"]), narrow, atol=1e-4, rtol=0)
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_generation_streams_the_text_that_json_holds(shoal: Shoal, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "def add", "--max-tokens", "12", "--seed", "7")
    assert shoal(*arguments).out == json.loads(shoal(*arguments, "--json").out)["text"] + "\n"


def test_a_stop_string_ends_the_text_before_it(shoal: Shoal, checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "def add", "--max-tokens", "24", "--seed", "7", "--json")
    whole = json.loads(shoal(*arguments).out)["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = json.loads(shoal(*arguments, "--stop", stop).out)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_plan_prints_the_published_size(shoal: Shoal) -> None:
    result = json.loads(shoal("plan", "deepseek-v3", "--json").out)
    parameters = result["parameters"]
    assert parameters["total"] - parameters["mtp"] == 671_026_419_200
    assert result["kv_bytes_per_token"]["bfloat16"] == 70_272
    assert "671" not in shoal("plan", "deepseek-v2-lite").out


def test_plan_reads_a_checkpoint_folder(shoal: Shoal, checkpoint: Path) -> None:
    stored = sum(tensor.numel() for tensor in hf.load(checkpoint).state_dict().values())
    assert json.loads(shoal("plan", checkpoint, "--json").out)["parameters"]["total"] == stored


def test_convert_to_bfloat16_and_back_to_the_same_names(
    shoal: Shoal, checkpoint: Path, tmp_path: Path
) -> None:
    assert shoal("convert", checkpoint, tmp_path / "narrow", "--dtype", "bfloat16").code == 0
    narrow, wide = hf.load(tmp_path / "narrow").state_dict(), hf.load(checkpoint).state_dict()
    assert narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        exact = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert torch.equal(narrow[name], exact), name
    assert (tmp_path / "narrow" / "tokenizer.json").exists()


def test_data_commands_make_a_tokenizer_and_a_shard(shoal: Shoal, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(json.__file__).read_text())
    assert shoal("data", "tokenizer", text, "--out", tmp_path / "tok", "--vocab-size", "400").code == 0
    made = shoal("data", "pack", text, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "shard.bin")
    assert made.code == 0
    assert made.out == ""
    assert "1 documents" in made.err


def test_data_steps_follow_one_another_to_a_page(shoal: Shoal, tmp_path: Path) -> None:
    library = Path(json.__file__).parent
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": (library / "scanner.py").read_text()}))
    files = [library / "decoder.py", library / "decoder.py", library / "scanner.py", tmp_path / "bad.jsonl"]
    (tmp_path / "copy.py").write_bytes(files[0].read_bytes())
    names = ("clean", "single", "paragraphs", "clear")
    folders = [tmp_path / name for name in names]
    kept = [folder / "documents-*.jsonl.zst" for folder in folders]
    made = shoal("data", "clean", *files, tmp_path / "copy.py", "--out", folders[0], "--workers", "1")
    assert "kept 3 of 3 documents" in made.err
    assert "1 records could not be read, first: " in made.err
    made = shoal("data", "dedup", kept[0], "--out", folders[1], "--workers", "1")
    assert "exact copy: 1 documents" in made.err
    assert (
        shoal("data", "dedup", kept[1], "--by", "paragraph", "--out", folders[2], "--workers", "1").code == 0
    )
    against = ("--against", tmp_path / "eval.jsonl")
    made = shoal("data", "decontaminate", kept[2], *against, "--out", folders[3], "--workers", "1")
    assert "evaluation text: 1 documents" in made.err
    assert shoal("data", "report", *folders, "--out", tmp_path / "page.html").code == 0
    shown = (tmp_path / "page.html").read_text()
    assert all(
        f"<h2>{step}" in shown for step in ("clean", "dedup by document", "dedup by paragraph", "decon")
    )


def test_fertility_compares_tokenizers_on_the_same_text(shoal: Shoal, checkpoint: Path) -> None:
    text = Path(json.decoder.__file__)
    arguments = ("--tokenizer", checkpoint, "--tokenizer", checkpoint / "tokenizer.json", "--json")
    rows = json.loads(shoal("data", "fertility", text, *arguments).out)
    assert [row["language"] for row in rows] == ["code", "code"]
    assert rows[0]["tokens"] == rows[1]["tokens"] > 0
    assert rows[0]["characters"] == len(text.read_text())
    assert rows[0]["tokens_per_character"] == rows[0]["tokens"] / rows[0]["characters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "deepseek-v33"), "deepseek-v3"),
        (("plan", "deepseek-v3", "--context", "0"), "0"),
        (("score", "no/such/folder", "--ids", "1"), "no/such/folder"),
        (("data", "tokenizer", "no-such-*.txt", "--out", "x"), "no-such-*.txt"),
        (("data", "pack", "x.txt", "--tokenizer", "nowhere", "--out", "x"), "nowhere"),
        (("data", "clean", "none.txt", "--out", "x"), "none.txt"),
        (("data", "clean", "--languages", "fr", __file__, "--out", "x"), "fr"),
        (("data", "clean", "--workers", "0", __file__, "--out", "x"), "workers is 0"),
        (("data", "dedup", "--by", "line", __file__, "--out", "x"), "line"),
        (("data", "decontaminate", "--against", "none.jsonl", __file__, "--out", "x"), "none.jsonl"),
        (("data", "report", "nowhere"), "nowhere"),
        (("data", "fertility", "--tokenizer", "nowhere", __file__), "nowhere"),
        (("train", "no-such.toml", "--out", "x"), "no-such.toml"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_that_names_it(
    shoal: Shoal, arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a plan of work may be left
    assert said in refusal(shoal(*arguments))


def test_a_dtype_of_no_engine_is_refused(shoal: Shoal, checkpoint: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}\n')
    for verb in (("serve", checkpoint), ("batch", checkpoint, requests, tmp_path / "out.jsonl")):
        assert "--dtype is 'float16'" in refusal(shoal(*verb, "--dtype", "float16"))


def test_input_is_given_one_way(shoal: Shoal, checkpoint: Path, tmp_path: Path) -> None:
    refusal(shoal("score", checkpoint))
    refusal(shoal("score", checkpoint, "text", "--ids", "1,2"))
    assert "1,x" in refusal(shoal("score", checkpoint, "--ids", "1,x"))
    assert "9999" in refusal(shoal("score", checkpoint, "--ids", "1,9999"))
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"fine \xff not")
    assert "byte 5" in refusal(shoal("score", checkpoint, "--file", broken))


def test_help_names_every_verb_and_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom shoal.cli import main\nsys.argv = ['shoal', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for verb in ("quickstart", "data", "train", "chat", "generate", "score", "convert", "plan"):
        assert verb in shown
