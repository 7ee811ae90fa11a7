"""Adapters of peft: every kind trains, is replayed, saved and loaded by peft, or is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from smezo_cli import train
from smezo_cli.cli import export, main
from smezo_cli.config.compose import compose
from smezo_cli.config.peft_fields import REFUSED, fields_of, kinds
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.adapter import attach
from smezo_cli.run.loaded import Loaded
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.scorer import Scorer
from tests.composed import settings_of
from tests.models.test_adapter import SMALL, WIDE, bits, causal, masked

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
#: a small config of every kind that can be trained
KINDS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
    "beft": LAYERS,
    "boft": LAYERS | {"boft_block_size": 4},
    "c3a": LAYERS | {"block_size": 4},
    "deft": LAYERS | {"r": 4},
    "delora": LAYERS | {"r": 4},
    "fourierft": LAYERS | {"n_frequency": 20},
    "frod": LAYERS,
    "glora": LAYERS | {"r": 4},
    "gralora": LAYERS | {"r": 4},
    "hira": LAYERS | {"r": 4},
    "hra": LAYERS | {"r": 4},
    "ia3": {},
    "ln_tuning": {},
    "loha": LAYERS | {"r": 4},
    "lokr": LAYERS | {"r": 4},
    "lora": {"r": 4},
    "miss": LAYERS | {"r": 4},
    "oft": LAYERS | {"oft_block_size": 4},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "psoft": LAYERS | {"r": 4},
    "randlora": LAYERS | {"r": 4},
    "road": LAYERS | {"group_size": 4},
    "shira": LAYERS | {"r": 2},
    "supertuning": LAYERS,
    "tinylora": LAYERS,
    "trainable_tokens": {"token_indices": [5, 9, 11, 7]},
    "unilora": LAYERS,
    "vblora": LAYERS | {"num_vectors": 8, "vector_length": 4},
    "vera": LAYERS | {"r": 4},
    "waveft": LAYERS | {"n_frequency": 20},
}
#: kinds of LoRA, by fields of its config
OF_LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 16},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "everywhere": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "tokens": {"trainable_token_indices": [5, 9, 11, 7]},
    "bias": {"lora_bias": True},
}
CASES = [
    *(pytest.param(kind, config, id=kind) for kind, config in KINDS.items()),
    *(pytest.param("lora", config, id=name) for name, config in OF_LORA.items()),
]
#: made of the weights of the model
UNPLANNED = ("frod", "shira")
SOFT = ("prompt_tuning", "p_tuning")
IDS = torch.tensor([[5, 9, 11, 7, 30]])


@pytest.fixture(scope="module")
def base() -> Any:
    return causal("llama", **WIDE)


def on_meta(base: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(base.config)


class Case:
    """An adapter in a model, trained by MeZO to tell the next token."""

    def __init__(self, base: Any, kind: str, config: dict[str, Any]) -> None:
        self.model = copy.deepcopy(base)
        self.adapter: Any = attach(self.model, {"kind": kind, "config": config}, seed=1)
        self.mezo = MeZO(self.model, lr=0.05, eps=1e-2, seed=3, executor="sequential")

    def loss(self) -> torch.Tensor:
        output: Any = self.model(input_ids=IDS, use_cache=False)
        return F.cross_entropy(output.logits[0, :-1], IDS[0, 1:])

    def logits(self) -> torch.Tensor:
        return logits(self.model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def test_every_kind_of_peft_is_trained_or_refused() -> None:
    assert kinds().keys() == KINDS.keys() | REFUSED.keys()
    assert not KINDS.keys() & REFUSED.keys()


# peft 0.21 asks for a name that transformers 5 gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_a_kind_trains_and_peft_loads_it(
    kind: str, config: dict[str, Any], base: Any, tmp_path: Path
) -> None:
    """Trained, replayed, switched off, saved alone and merged: an independent forward agrees."""
    case = Case(base, kind, config)
    model, before = case.model, bits(case.model)
    case.mezo.self_check(case.loss)
    records = [case.mezo.step(case.loss) for _ in range(3)]
    after = bits(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == case.mezo.trained.keys()

    torch.rand(1)  # the global generator has no say
    again = Case(base, kind, config)
    assert all(torch.equal(p, before[name]) for name, p in again.model.named_parameters())
    for record in records:
        again.mezo.replay(0.05, record.scalars)
    assert all(torch.equal(p, after[name]) for name, p in again.model.named_parameters())

    mine, raw = case.logits(), logits(base)
    assert float((mine - raw).abs().max()) > 1e-4
    with case.adapter.off():
        assert torch.equal(case.logits(), raw)
    assert torch.equal(case.logits(), mine)
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}

    if case.adapter.merges:
        case.adapter.save(tmp_path / "merged")
        assert "transformers loads it" in case.adapter.loaded_by
        assert torch.equal(case.logits(), mine)  # saving changes nothing
        # float32 sums of some ten numbers of order 1, rounded once more.
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits(whole), mine, rtol=1e-4, atol=1e-4)
    case.adapter.merges = False
    case.adapter.save(tmp_path / "alone")
    assert "peft loads it" in case.adapter.loaded_by
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of merging and of kernels for CUDA
        theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "alone").eval()
    if kind in SOFT:  # the output layer computes other rows at once, in another order
        torch.testing.assert_close(logits(theirs)[:, 3:], mine, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(theirs), mine)

    if kind not in UNPLANNED:
        planned = on_meta(base)
        attach(planned, {"kind": kind, "config": config}, seed=0)
        trained = {n: p.shape for n, p in planned.named_parameters() if p.requires_grad}
        assert trained == {name: p.shape for name, p in case.mezo.trained.items()}
        assert all(p.device.type == "meta" for p in planned.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "lora_fa"])
def test_peft_loads_the_matrices_of_our_own_lora(kind: str, base: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    node = {"kind": kind, "r": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
    adapter = attach(model, node, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    adapter.merges = False
    adapter.save(tmp_path / "alone")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "alone").eval()
    assert not torch.equal(logits(model), logits(base))
    assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("kind", UNPLANNED)
def test_a_kind_that_is_made_of_weights_has_no_plan(kind: str, base: Any) -> None:
    with pytest.raises(UserError, match=f"kind={kind} is made of the weights of the model, which"):
        attach(on_meta(base), {"kind": kind, "config": KINDS[kind]}, seed=0)


@pytest.mark.parametrize(("kind", "why"), REFUSED.items())
def test_a_kind_that_cannot_be_trained_is_one_sentence(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=f"method.adapter.kind={kind} {why}"):
        checked(kind=kind)


def checked(kind: str = "lora", **config: Any) -> dict[str, Any]:
    settings = settings_of(*SMALL, "model=tiny-llama", "method=mezo_peft")
    from smezo_cli.config.groups import checked_adapter

    assert settings.method["adapter"] == {"kind": "lora", "config": {}}
    return checked_adapter({"kind": kind, "config": config})


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("lora", "lora_alpa", 3, "no method.adapter.config.lora_alpa of kind lora, did you mean"),
        ("ia3", "r", 3, "there is no method.adapter.config.r of kind ia3"),
        ("lora", "r", "many", "config.r=many: it must be a whole number"),
        ("lora", "r", True, "config.r=true: it must be a whole number"),
        ("lora", "use_dora", 1, "config.use_dora=1: it must be true or false"),
        ("lora", "target_modules", 3, "it must be a list or a word or null"),
        ("lora", "lora_dropout", 0.1, "dropout draws another one at each forward"),
        ("oft", "module_dropout", 0.5, "dropout draws another one at each forward"),
        ("lora", "task_type", "CAUSAL_LM", "config.task_type is set by smezo"),
        ("lora", "init_lora_weights", "pissa", "set true or false or gaussian or orthogonal"),
        ("lora", "init_lora_weights", 1, "set true or false or gaussian or orthogonal"),
        ("lora", "modules_to_save", ["lm_head"], "trains whole modules of the model"),
        ("lora", "bias", "all", "trains vectors of the model itself"),
        ("lora", "target_parameters", ["q_proj.weight"], "is computed where no probe reaches it"),
        ("lora", "eva_config", {}, "is an object of peft that no setting can write"),
        ("lora", "megatron_core", "os", "has peft import a module by name: set megatron.core"),
        ("prompt_tuning", "prompt_tuning_init", "TEXT", "set RANDOM or SAMPLE_VOCAB"),
        ("p_tuning", "encoder_reparameterization_type", "LSTM", "no probe reaches them: set MLP"),
        ("prompt_tuning", "tokenizer_kwargs", None, "num_virtual_tokens is needed by kind prompt"),
        ("prompt_tuning", "num_virtual_tokens", 0, "tokens=0: it must be a whole number from 1"),
        ("adaption_prompt", "adapter_layers", -1, "layers=-1: it must be a whole number from 1"),
        ("lora", "target_modules", [3], r"modules=\[3\]: 3 must be a word"),
        ("lora", "layers_to_transform", ["q"], "'q'.: q must be a whole number"),
        ("lora", "trainable_token_indices", [-5], "must be a list of tokens as whole numbers from"),
        ("lora", "trainable_token_indices", {"e": [5, 5]}, "each once"),
        ("trainable_tokens", "token_indices", [3, -5], "must be a list of tokens as whole numbers"),
        ("prompt_tuning", "prompt_tuning_init_text", "x", "read by prompt_tuning_init=TEXT alone"),
    ],
)
def test_mistakes_in_a_config_are_one_sentence(
    kind: str, field: str, value: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        checked(kind, **{field: value})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=mezo_peft method.adapter.kind=ia4", "peft has no such kind, did you mean ia3"),
        ("method=mezo_lora method.adapter.kind=ia3", "choose method=mezo_peft method.adapter.kind"),
        ("method=mezo_lora method.adapter.config.use_dora=true", "choose method=mezo_peft"),
        ("method=mezo_peft method.adapter.config=3", "must be a mapping of fields"),
        # Not taken as ia3: the digest of a run is that of the words.
        ("method=mezo_peft method.adapter.kind=IA3", "kind=IA3: .* write method.adapter.kind=ia3"),
        ("method=mezo_lora method.adapter.kind=IA3", "kind=IA3: .* write method.adapter.kind=ia3"),
        ("method=mezo_lora method.adapter.kind=LORA", "kind must be lora, lora_fa, prefix or tens"),
        (
            "method=mezo_peft method.adapter.kind=null",
            "kind=null: a config is of a kind of peft: add",
        ),
        (
            "method=mezo_peft method.adapter.kind=p_tuning "
            "method.adapter.config.num_virtual_tokens=100000",
            "num_virtual_tokens=100000 stand before each row .* give [0-9]+ or fewer",
        ),
        (
            "method=mezo_prefix method.adapter.num_tokens=5000",
            "num_tokens=5000 stand before each row",
        ),
    ],
)
def test_mistakes_on_the_line_are_one_sentence(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(compose([*SMALL, "model=tiny-llama", *words.split()]))


def test_fields_need_no_plus_and_no_name_of_the_yaml() -> None:
    """Also one that is named like a setting of methods, as the eps of OFT is."""
    words = "method.adapter.kind=oft method.adapter.config.eps=1e-5 eps=1e-2"
    settings = settings_of(
        *SMALL, "model=tiny-llama", "method=mezo_peft", *words.split(), "method.adapter.config.r=4"
    )
    assert settings.method["adapter"] == {"kind": "oft", "config": {"eps": 1e-5, "r": 4}}
    assert settings.method["eps"] == 1e-2


def test_fields_are_those_that_peft_has() -> None:
    """The source is read; the classes themselves are the reference."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    for kind in KINDS:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
        assert fields_of(kind).keys() == vars(config)["__dataclass_fields__"].keys()


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("lora", {"loftq_config": {"loftq_bits": 4}}, ["`loftq_config` specified but will be ign"]),
        (
            "p_tuning",
            {"num_virtual_tokens": 3, "encoder_num_layers": 5},
            ["for MLP, the argument `enc"],
        ),
        (
            "lora",
            {"rank_pattern": {"nothing": 3}},
            ["The following rank_pattern keys did not match"],
        ),
        ("beft", LAYERS, []),  # peft warns of things that no field is the reason of
    ],
)
def test_what_peft_says_of_a_field_is_said_once(
    kind: str, config: dict[str, Any], said: list[str], base: Any
) -> None:
    lines: list[str] = []
    attach(copy.deepcopy(base), {"kind": kind, "config": config}, 0, lines.append)
    assert len(lines) == len(said)
    assert all(
        line.startswith(f"  adapter  peft says: {s}") for line, s in zip(lines, said, strict=True)
    )


def test_a_model_that_an_adapter_does_not_fit_is_one_sentence() -> None:
    tied = causal("llama", **WIDE, tie_word_embeddings=True)
    for model, kind, config, said in [
        (causal("llama", **WIDE), "lora", {"target_modules": ["nothing"]}, "does not fit Llama"),
        (causal("llama", **WIDE), "c3a", {"block_size": 7}, "kind=c3a does not fit LlamaForCausal"),
        (
            causal("llama", **WIDE),
            "lora",
            {"target_modules": "("},
            "fit .* unterminated subpattern",
        ),
        (causal("llama", **WIDE), "vera", LAYERS | {"r": 0}, "does not fit .*division by zero"),
        (
            causal("llama", **WIDE),
            "prompt_tuning",
            {"num_virtual_tokens": 0},
            "no weights to train",
        ),
        (masked("bert"), "prompt_tuning", {"num_virtual_tokens": 3}, "are for causal models"),
        (tied, "lora", {"target_modules": ["lm_head"]}, "the weight of lm_head is that of another"),
    ]:
        with pytest.raises(UserError, match=said):
            attach(model, {"kind": kind, "config": config}, seed=0)


@pytest.mark.parametrize("kind", SOFT)
def test_a_soft_prompt_is_seen_through_padding_and_caches(kind: str) -> None:
    """Scores of unequal rows are those of each alone; behind a cache those of whole sequences."""
    settings = settings_of(*SMALL, "model=tiny-llama", "method=mezo")
    job = Loaded(settings, "cpu", lambda line: None)
    rows = [
        Candidates(((*range(35, n), 40, 41), (*range(35, n), 50)), (2, 1), 0, False)
        for n in (39, 48)
    ]
    with torch.no_grad():
        before = job.scorer.scores(rows)
        adapter = attach(job.model, {"kind": kind, "config": KINDS[kind]}, seed=0)
        scorer = Scorer(job.model, job.tokenizer, places_before=adapter.num_places)
        for p in job.model.get_submodule("prompt_encoder").parameters():
            p.mul_(2)
        both = scorer.scores(rows)
        alone = torch.cat([scorer.scores([row]) for row in rows])
        scorer.always_caches = True
        cached = scorer.scores(rows)
    # Sums of a handful of float32 numbers of order 1, in another order.
    torch.testing.assert_close(both.view(-1), alone.view(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached, both, atol=1e-5, rtol=1e-5)
    assert float((both - before).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", SOFT)
def test_a_soft_prompt_stands_before_labels_of_one_token(
    kind: str, tmp_path: Path, base: Any
) -> None:
    """Scores are log-probabilities that peft's own model gives, also behind what all rows share."""
    model = copy.deepcopy(base)
    adapter: Any = attach(model, {"kind": kind, "config": KINDS[kind]}, seed=0)
    with torch.no_grad():
        for p in model.get_submodule("prompt_encoder").parameters():
            p.mul_(20)
    adapter.save(tmp_path / "alone")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "alone").eval()
    labels = (30, 31, 29)
    texts = [(*range(10, 19), *range(2, n)) for n in (5, 12, 8)]
    rows = [Candidates(tuple((*t, label) for label in labels), (1, 1, 1), 0, False) for t in texts]
    job = Loaded(settings_of(*SMALL, "model=tiny-llama", "method=mezo"), "cpu", lambda _: None)
    scorer = Scorer(model, job.tokenizer, places_before=adapter.num_places)
    scorer.holds_common = True
    with torch.no_grad():
        last = [theirs(input_ids=torch.tensor([t])).logits[0, -1, list(labels)] for t in texts]
        found = scorer.scores(rows)
        with scorer.holding(rows):
            assert scorer._held is not None
            held = scorer.scores(rows)
        counted = model(input_ids=torch.tensor(texts[:1]), logits_to_keep=2).logits
        every = model(input_ids=torch.tensor(texts[:1]), logits_to_keep=99).logits
        whole = theirs(input_ids=torch.tensor(texts[:1])).logits[:, adapter.num_places :]
    want = torch.stack(last).log_softmax(-1)
    # Sums of some ten float32 numbers of order 1, in another order.
    torch.testing.assert_close(found.log_softmax(-1), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held.log_softmax(-1), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(counted, whole[:, -2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(every, whole, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of four steps: ia3 by MeZO, DoRA by backpropagation."""
    folder = tmp_path_factory.mktemp("runs")
    for name, *words in (
        ("ia3", "method=mezo_peft", "method.adapter.kind=ia3", "method.executor=sequential"),
        ("dora", "method=peft", "method.adapter.config.use_dora=true"),
    ):
        more = (f"runs_dir={folder}", f"name={name}", "steps=4", "eval_every=2", "batch_size=4")
        assert train.main([*SMALL, "model=tiny-llama", *words, *more, "lr=0.05"]) == 0
    return folder


@pytest.mark.parametrize("name", ["ia3", "dora"])
def test_a_run_is_scored_exported_and_made_again(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = (runs / name).iterdir()
    result = json.loads((run / "result.json").read_text())
    assert main(["eval", str(run)]) == 0
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(run), "--base", "--out", str(tmp_path / "base.jsonl")]) == 0
    assert f"test accuracy {result['zero_shot']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "alone"), "--adapter"]) == 0
    assert "peft loads it: PeftModel.from_pretrained(" in capsys.readouterr().out
    saved = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == result["num_trained"]
    assert main(["export", str(run), str(tmp_path / "whole")]) == 0
    assert "transformers loads it: LlamaForCausalLM" in capsys.readouterr().out
    if name == "ia3":
        assert main(["export", str(run), str(tmp_path / "run.delta"), "--delta"]) == 0
        assert main(["replay", str(tmp_path / "run.delta"), "--out", str(tmp_path / "again")]) == 0
        assert "NOT" not in capsys.readouterr().out
        again, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("again", "whole"))
        assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["adaption_prompt", *SOFT])
def test_peft_scores_what_was_exported_as_the_run_does(kind: str, tmp_path: Path) -> None:
    """From `smezo train` by `smezo export --adapter` to peft, on labels of one token."""
    fields = [f"method.adapter.config.{name}={value}" for name, value in KINDS[kind].items()]
    words = [*SMALL, "model=tiny-llama", "method=mezo_peft", f"method.adapter.kind={kind}", *fields]
    more = ["lr=0.5", "steps=2", "batch_size=4", "method.executor=sequential"]
    assert train.main([*words, *more, f"runs_dir={tmp_path}", "name=one"]) == 0
    (run,) = (tmp_path / "one").iterdir()
    assert main(["eval", str(run), "--step", "2", "--out", str(tmp_path / "rows.jsonl")]) == 0
    alone = tmp_path / "alone"
    assert main(["export", str(run), str(alone), "--step", "2", "--adapter"]) == 0

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(alone)
    texts = [f"{row['fields']['text']}. It was" for row in rows]
    labels = [tokenizer(f"{texts[0]} {word}")["input_ids"][-1] for word in ("terrible", "great")]
    raw: Any = Loaded(settings_of(*SMALL, "model=tiny-llama", "method=mezo"), "cpu", print).model

    def scores(model: Any) -> torch.Tensor:
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        with torch.no_grad():
            logits = [model(input_ids=one, use_cache=False).logits[0, -1, labels] for one in ids]
        return torch.stack(logits).log_softmax(-1)

    before = scores(raw)
    found = torch.tensor([row["scores"] for row in rows])
    # Sums of some ten float32 numbers of order 1, in another order.
    theirs = scores(PeftModel.from_pretrained(raw, alone).eval())
    torch.testing.assert_close(theirs, found, atol=1e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 1e-3


def test_only_an_adapter_is_exported_as_one(runs: Path, tmp_path: Path) -> None:
    words = [*SMALL, "model=tiny-llama", "method=mezo", f"runs_dir={tmp_path}", "steps=1"]
    assert train.main([*words, "method.executor=sequential"]) == 0
    (run,) = (tmp_path / "default").iterdir()
    with pytest.raises(UserError, match="has no adapter: leave --adapter out"):
        export.main([str(run), str(tmp_path / "alone"), "--adapter"])
    (run,) = (runs / "ia3").iterdir()
    with pytest.raises(UserError, match="--adapter beside --delta"):
        export.main([str(run), str(tmp_path / "alone"), "--adapter", "--delta"])
