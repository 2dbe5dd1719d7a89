"""A verdict is on the whole fine-tune, or says first that it is not, with exit code 2.

The cases are rebuilt from public reports: the issue or pull request is named at each.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.cli import main
from spectra.errors import UsageError, WrongBaseError
from tests.support.coverage import DIALECTS, K, Q, Tensors, changed, drawn, factors, pickled, write

# Names of one more tensor, in terms of an adapted module; none is that of a new head.
UNKNOWN = (
    "{module}.gate", "{module}.mask.weight", "{module}.scale", "{module}.lora_C.weight", "{module}.router.0.weight",
    "{module}.new_factor", "{module}_lora_core.weight", "unheard.of.weight", "unheard.of.bias", "unheard_of",
    "gates.0.weight", "vera_lambda_b", "lora_router.weight", "base_model.model.unheard.of",
    "model.layers.7.self_attn.q_proj.weight",
)  # fmt: skip
SHAPES = ((2, 2), (16, 16), (5,), (1,), (2, 3, 4))


def audit(capsys, *arguments):
    code = main(["audit", *map(str, arguments), "--quiet"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def put(written, name, value):
    """Adds a tensor, or gives one another value."""
    changed(written, lambda tensors: tensors.update({name: value}))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_whole(tmp_path, capsys, rng, dialect):
    written = DIALECTS[dialect](tmp_path, rng)
    code, out, err = audit(capsys, written.tuned, "--base", written.base)
    assert (code, err) == (0, ""), "the control"
    assert out.startswith(("No intruder dimensions ", "Intruder dimensions: ", "Cannot tell: "))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_unknown_tensor_is_never_left_out_quietly(tmp_path, capsys, rng, dialect):
    for number, (name, shape) in enumerate(itertools.product(UNKNOWN, SHAPES)):
        written = DIALECTS[dialect](tmp_path / str(number), rng)
        added = name.format(module=written.module)
        put(written, added, drawn(rng, *shape))
        code, out, err = audit(capsys, written.tuned, "--base", written.base)
        assert code == 2, (added, shape, out)
        assert err.startswith("spectra: error: "), (added, shape)
        assert not out or out.startswith("Partial: "), (added, shape)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_one_emptied_tensor_is_refused(tmp_path, capsys, rng, dialect, shape):
    for number, name in enumerate(_tensors(DIALECTS[dialect](tmp_path / "names", rng).file)):
        written = DIALECTS[dialect](tmp_path / str(number), rng)
        put(written, name, np.zeros(shape, np.float32))
        code, out, err = audit(capsys, written.tuned, "--base", written.base, "--allow-partial")
        assert (code, out) == (2, ""), name
        assert err.startswith("spectra: error: "), name


@pytest.mark.parametrize(
    "name", ["score.weight", "classifier.weight", "classifier.0.dense.weight", "qa_outputs.weight"]
)
@pytest.mark.parametrize("dialect", ["peft LoRA", "peft IA3", "full"])
def test_a_new_head_is_understood(tmp_path, capsys, rng, dialect, name):
    written = DIALECTS[dialect](tmp_path, rng)
    prefix = "base_model.model." if dialect.startswith("peft") else ""
    more = {prefix + name: drawn(rng, 3, 16), prefix + name.replace("weight", "bias"): drawn(rng, 3)}
    changed(written, lambda tensors: tensors.update(more))
    code, _, err = audit(capsys, written.tuned, "--base", written.base)
    assert (code, err) == (0, "")
    report = spectra.audit(written.tuned, written.base)
    assert report.coverage.new == 2
    assert not report.coverage.is_partial


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL, "bert": SMALL, "roberta": SMALL, "modernbert": SMALL | {"global_attn_every_n_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "t5": {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": 99},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8,
                        "layer_types": ["full_attention"] * 2},
    "mixtral": SMALL | {"num_local_experts": 4, "num_key_value_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_classifier_is_whole(tmp_path, transformers, family):
    """The control: a model class with a new head, all of it trained, on the plain model."""
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **special)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    report = spectra.audit(tmp_path / "tuned", tmp_path / "base", cache=False)
    assert not report.coverage.is_partial, report.to_text()
    assert report.coverage.new
    assert report.coverage.analysed


def test_more_layers_than_the_base_has_are_no_head(tmp_path, capsys, rng):
    """A decoder on an encoder, a deeper model: what is not placed although "decoder" is what some heads are called."""
    names = [f"encoder.layers.{i}.self_attn.q_proj.weight" for i in range(4)]
    base = write(tmp_path / "base" / "model.safetensors", {name: drawn(rng, 16, 16) for name in names}).parent
    for number, more in enumerate(("decoder.layers.0.cross.q_proj.weight", "encoder.layers.9.self_attn.q_proj.weight",
                                   "vision.blocks.0.head.weight")):  # fmt: skip
        home = tmp_path / str(number) / "model.safetensors"
        tuned = write(home, {name: drawn(rng, 16, 16) for name in (*names, more)}).parent
        code, out, _ = audit(capsys, tuned, "--base", base)
        assert code == 2
        assert out.startswith("Partial: 1 of 5 updates was not looked at.\n  " + more.removesuffix(".weight"))


def test_what_modules_to_save_names_is_understood(tmp_path, capsys, rng):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    name = "base_model.model.my_own_top.weight"
    changed(written, lambda tensors: tensors.update({name: drawn(rng, 3, 16)}))
    assert audit(capsys, written.tuned, "--base", written.base)[0] == 2
    config = json.loads((written.tuned / "adapter_config.json").read_text())
    (written.tuned / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["my_own_top"]}))
    assert audit(capsys, written.tuned, "--base", written.base)[0] == 0


# Weights beside: haotian-liu/LLaVA#784, JIA-Lab-research/LongLoRA#79, 2U1/Qwen-VL-Series-Finetune, and others.

BESIDE = ("non_lora_trainables.bin", "trainable_params.bin", "non_lora_state_dict.bin", "new_embeddings.safetensors",
          "mm_projector.bin", "value_head.safetensors", "learned_embeds.bin", "something.safetensors")  # fmt: skip
SAME = ("adapter_model.bin", "pytorch_model.bin", "model.fp16.safetensors", "adapter_model.gguf", "optimizer.pt",
        "rng_state_0.pth", "training_args.bin")  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_trained_weights_beside_an_adapter_are_named(tmp_path, capsys, rng, name):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    value = {"base_model.model.model.embed_tokens.weight": drawn(rng, 24, 16)}
    if name.endswith(".bin"):
        pickled(written.tuned / name, value)
    else:
        write(written.tuned / name, value)
    code, out, err = audit(capsys, written.tuned, "--base", written.base)
    assert code == 2
    assert out.startswith(f"Partial: 1 of 3 updates was not looked at.\n  {name}: ")
    assert err.startswith(f"spectra: error: {written.tuned}: 1 of 3 updates was not looked at ({name}: ")
    code, out, err = audit(capsys, written.tuned, "--base", written.base, "--allow-partial")
    assert code == 0
    assert out.startswith("Partial: ")
    assert err.startswith("spectra: note: ")
    report = spectra.audit(written.tuned, written.base)
    assert report.coverage.not_read == 1
    assert report.coverage.share_of_parameters is None, "what is in a file that is not read is not known"
    for verb, options in ((spectra.repair, {"scale": 0.5}), (spectra.sweep, {"evaluate": len})):
        with pytest.raises((UsageError, TypeError), match=f"of a part of the fine-tune would lose the rest .{name}"):
            verb(written.tuned, written.base, **options)


@pytest.mark.parametrize("name", SAME)
def test_other_forms_of_the_same_weights_are_no_part(tmp_path, capsys, rng, name):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    (written.tuned / name).write_bytes(b"never read")
    (written.tuned / "checkpoint-10").mkdir()
    write(written.tuned / "checkpoint-10" / "adapter_model.safetensors", {"w": drawn(rng, 2, 2)})
    code, out, err = audit(capsys, written.tuned, "--base", written.base)
    assert (code, err) == (0, "")
    assert "checkpoint-10/" in out
    skipped = {item["name"]: item["kind"] for item in spectra.audit(written.tuned, written.base).skipped}
    assert skipped["checkpoint-10/"] == "no_update"
    assert skipped.get(name, "no_update") == "no_update"


def test_modules_of_sentence_transformers_are_parts(tmp_path, capsys, rng):
    written = DIALECTS["full"](tmp_path, rng)
    write(written.tuned / "2_Dense" / "model.safetensors", {"linear.weight": drawn(rng, 4, 16)})
    assert audit(capsys, written.tuned, "--base", written.base)[0] == 0, "a folder that nothing names"
    (written.tuned / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    code, out, _ = audit(capsys, written.tuned, "--base", written.base)
    assert code == 2
    assert "2_Dense/: modules.json names it as a part of this model; its weights were not read" in out


# Names: AUTOMATIC1111/stable-diffusion-webui#8360, bmaltais/kohya_ss#307, huggingface/diffusers#12074.


def image_files(tmp_path, rng):
    """SD 1.5 as one file, and a LoRA of it as sd-scripts names the diffusers' modules."""
    inner = "transformer_blocks.0.attn1.to_q"
    places = {
        f"lora_unet_down_blocks_0_attentions_0_{inner.replace('.', '_')}": f"input_blocks.1.1.{inner}",
        f"lora_unet_mid_block_attentions_0_{inner.replace('.', '_')}": f"middle_block.1.{inner}",
        f"lora_unet_up_blocks_1_attentions_2_{inner.replace('.', '_')}": f"output_blocks.5.1.{inner}",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj": "input_blocks.1.0.emb_layers.1",
    }
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    base = {f"model.diffusion_model.{name}.weight": drawn(rng, 16, 16) for name in places.values()}
    base[f"cond_stage_model.transformer.{text}.weight"] = drawn(rng, 16, 16)
    tensors: Tensors = {}
    for name in (*places, f"lora_te_{text.replace('.', '_')}"):
        A, B = factors(rng)
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    return write(tmp_path / "base" / "v1-5.safetensors", base), write(tmp_path / "tuned.safetensors", tensors), places


def test_a_unet_under_the_names_of_other_tools(tmp_path, rng):
    base, tuned, places = image_files(tmp_path, rng)
    report = spectra.audit(tuned, base)
    assert {layer.name for layer in report.layers} == {
        *(f"model.diffusion_model.{name}" for name in places.values()),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    }
    assert not report.coverage.is_partial


def test_the_names_of_single_files_on_a_pipeline(tmp_path, rng):
    """sd-scripts names SDXL's modules as LDM does."""
    inner = "transformer_blocks.0.attn1.to_q"
    places = {
        f"input_blocks_4_1_{inner.replace('.', '_')}": f"down_blocks.1.attentions.0.{inner}",
        f"output_blocks_5_1_{inner.replace('.', '_')}": f"up_blocks.1.attentions.2.{inner}",
        "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    }
    weights = {f"{name}.weight": drawn(rng, 16, 16) for name in places.values()}
    write(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors", weights, config={"_class_name": "UNet"})
    index = {"_class_name": "XL", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    tensors: Tensors = {}
    for name in places:
        A, B = factors(rng)
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
    report = spectra.audit(write(tmp_path / "tuned.safetensors", tensors), tmp_path / "base")
    assert {layer.name for layer in report.layers} == {f"unet.{name}" for name in places.values()}


def test_a_text_encoder_in_open_clips_names(tmp_path, capsys, rng):
    home = "conditioner.embedders.1.model.transformer.resblocks.0"
    weights = {f"{home}.attn.in_proj_weight": drawn(rng, 48, 16), f"{home}.mlp.c_fc.weight": drawn(rng, 16, 16)}
    base = write(tmp_path / "base" / "sdxl.safetensors", weights)
    tensors: Tensors = {}
    for name in ("self_attn_q_proj", "self_attn_v_proj", "mlp_fc1"):
        A, B = factors(rng)
        module = f"lora_te2_text_model_encoder_layers_0_{name}"
        tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B}
    tuned = write(tmp_path / "tuned.safetensors", tensors)
    code, _, err = audit(capsys, tuned, "--base", base)
    assert code == 2
    assert f"together with others in '{home}.attn.in_proj_weight'" in err
    names = [layer.name for layer in spectra.audit(tuned, base, split_fused=True).layers]
    assert names == [f"{home}.attn.q_proj", f"{home}.attn.v_proj", f"{home}.mlp.c_fc"]


@pytest.mark.parametrize("dialect", ["peft LoRA", "peft LoHa", "peft IA3"])
def test_an_adapter_without_factors_says_so(tmp_path, capsys, rng, dialect):
    written = DIALECTS[dialect](tmp_path, rng)

    def keep_the_head(tensors):
        tensors.clear()
        tensors["base_model.model.score.weight"] = drawn(rng, 3, 16)

    changed(written, keep_the_head)
    code, out, err = audit(capsys, written.tuned, "--base", written.base, "--allow-partial")
    assert (code, out) == (2, "")
    assert "holds no factor of " in err


def test_a_part_that_the_base_does_not_have_is_said(tmp_path, capsys, rng):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    alone = write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {name: drawn(rng, 16, 16)})
    lora = {
        key: factors(rng)[key.endswith("up.weight")]
        for module in (f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}",
                       "lora_te_text_model_encoder_layers_0_self_attn_q_proj")
        for key in (f"{module}.lora_down.weight", f"{module}.lora_up.weight")
    }  # fmt: skip
    both = write(tmp_path / "both.safetensors", lora)
    code, out, err = audit(capsys, both, "--base", alone.parent)
    assert code == 2
    assert out.startswith("Partial: 1 of 2 updates was not looked at.\n  lora_te_text_model")
    assert "no weight of the base has its name" in err
    assert "another model" not in out + err
    code, out, _ = audit(capsys, both, "--base", alone.parent, "--exclude", "lora_te_")
    assert code == 0, "what the user leaves out is no part"
    assert out.startswith(("No intruder dimensions ", "Intruder dimensions: ", "Cannot tell: "))
    assert spectra.audit(both, alone.parent, exclude="lora_te_").coverage.left_out == 1


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "diffusion_model.", "transformer."])
def test_two_transformers_are_asked_for(tmp_path, rng, prefix):
    name = "blocks.0.attn1.to_q"
    for part in ("transformer", "transformer_2"):
        write(tmp_path / "base" / part / "diffusion_pytorch_model.safetensors", {f"{name}.weight": drawn(rng, 16, 16)},
              config={"_class_name": "WanTransformer3DModel"})  # fmt: skip
    index = {part: ["diffusers", "WanTransformer3DModel"] for part in ("transformer", "transformer_2")}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    own = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    A, B = factors(rng)
    tuned = write(tmp_path / "low.safetensors", {f"{own}.lora_down.weight": A, f"{own}.lora_up.weight": B})
    with pytest.raises(WrongBaseError, match=r"does not guess which are meant.*base/transformer or .*transformer_2"):
        spectra.audit(tuned, tmp_path / "base")
    assert len(spectra.audit(tuned, tmp_path / "base" / "transformer_2").layers) == 1
    if prefix == "transformer.":  # which the file itself tells apart
        more = {key.replace("transformer.", "transformer_2."): value for key, value in (
            (f"{own}.lora_down.weight", A), (f"{own}.lora_up.weight", B))}  # fmt: skip
        both = {f"{own}.lora_down.weight": A, f"{own}.lora_up.weight": B} | more
        report = spectra.audit(write(tmp_path / "both.safetensors", both), tmp_path / "base")
        assert {layer.name for layer in report.layers} == {f"transformer.{name}", f"transformer_2.{name}"}


def text_encoders(tmp_path, rng, prefixes):
    """An SDXL file, of small text encoders of one width, and a LoRA of them."""
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    base = {f"conditioner.embedders.{i}.transformer.{text}.weight": drawn(rng, 16, 16) for i in prefixes}
    tensors: Tensors = {}
    for number in (1, 2):
        A, B = factors(rng)
        module = f"lora_te{number}_{text.replace('.', '_')}"
        tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B}
    return write(tmp_path / "base" / "sdxl.safetensors", base), write(tmp_path / "tuned.safetensors", tensors)


def test_a_text_encoder_is_never_put_on_the_other_one(tmp_path, capsys, rng):
    base, tuned = text_encoders(tmp_path / "both", rng, (0, 1))
    names = {layer.name for layer in spectra.audit(tuned, base).layers}
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    base, tuned = text_encoders(tmp_path / "one", rng, (0,))
    code, out, _ = audit(capsys, tuned, "--base", base)
    assert code == 2
    assert out.startswith("Partial: 1 of 2 updates was not looked at.\n  lora_te2_text_model")
    text = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    alone = write(tmp_path / "alone" / "model.safetensors", {text: drawn(rng, 16, 16)})
    with pytest.raises(WrongBaseError, match="the text encoders lora_te1 and lora_te2 both fit its modules"):
        spectra.audit(tuned, alone.parent)


# Wrappers: pytorch/torchtitan#2622, meta-pytorch/torchtune#1399, huggingface/peft and others.


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module",
                                     "_orig_mod._checkpoint_wrapped_module"])  # fmt: skip
@pytest.mark.parametrize("dialect", ["peft LoRA", "full", "mlx"])
def test_what_wraps_modules_in_training_is_no_part_of_a_name(tmp_path, rng, dialect, wrapper):
    plain = DIALECTS[dialect](tmp_path / "plain", np.random.default_rng(3))
    wrapped = DIALECTS[dialect](tmp_path / "wrapped", np.random.default_rng(3))

    def wrap(tensors):
        for name in list(tensors):
            inside = name.replace("layers.0.", f"layers.0.{wrapper}.").replace("layers.1.", f"layers.1.{wrapper}.")
            tensors[inside] = tensors.pop(name)

    changed(wrapped, wrap)
    expected = spectra.audit(plain.tuned, plain.base).to_dict(canonical=True)
    found = spectra.audit(wrapped.tuned, wrapped.base).to_dict(canonical=True)
    assert found["layers"] == expected["layers"]
    assert found["skipped"] == expected["skipped"]


def test_a_wrapped_model_is_repaired(tmp_path, rng):
    written = DIALECTS["full"](tmp_path, rng)
    changed(written, lambda tensors: tensors.update({Q.replace("layers.0.", "layers.0._orig_mod.") + ".weight":
                                                     tensors.pop(f"{Q}.weight")}))  # fmt: skip
    record = spectra.repair(written.tuned, written.base, scale=0.5, which={"layers.0": [0]}, to=tmp_path / "out")
    assert [layer.name for layer in record.changed] == [Q]
    assert spectra.verify(tmp_path / "out", written.base, source=written.tuned).holds


@pytest.mark.parametrize("before", ["model.", "_forward_module.", "pretrained_model.", "policy.module."])
def test_a_prefix_before_pefts_own(tmp_path, rng, before):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    expected = [layer.intruders for layer in spectra.audit(written.tuned, written.base).layers]

    def rename(tensors):
        for name in list(tensors):
            tensors[before + name] = tensors.pop(name)

    changed(written, rename)
    report = spectra.audit(written.tuned, written.base)
    assert [layer.name for layer in report.layers] == [Q, K]
    assert [layer.intruders for layer in report.layers] == expected


@pytest.mark.parametrize("adapter", ["default", "default.default", "mine.mine"])
def test_an_adapters_name_in_its_keys(tmp_path, rng, adapter):
    written = DIALECTS["peft LoRA"](tmp_path, rng)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", f".{adapter}.weight")] = tensors.pop(name)

    changed(written, rename)
    assert len(spectra.audit(written.tuned, written.base).layers) == 2


def test_base_layers_without_factors_are_the_model(tmp_path, rng):
    written = DIALECTS["full"](tmp_path, rng)
    changed(written, lambda tensors: tensors.update({f"{Q}.base_layer.weight": tensors.pop(f"{Q}.weight")}))
    assert Q in {layer.name for layer in spectra.audit(written.tuned, written.base).layers}


# Configs: ms-swift, huggingface/peft#1168, InternLM/lmdeploy#1151.


@pytest.mark.parametrize(
    ("field", "value"),
    [("lorap_lr_ratio", 16.0), ("lorap_emb_lr", 1e-6), ("lora_dtype", "float32"), ("_from_model_config", True),
     ("merge_weights", True), ("model_key_mapping", {"q": "q_proj"}), ("loraplus_lr_ratio", 4.0)],
)  # fmt: skip
@pytest.mark.parametrize("dialect", ["peft LoRA", "peft LoHa"])
def test_options_that_change_no_weight_are_a_note(tmp_path, rng, dialect, field, value):
    written = with_option(DIALECTS[dialect](tmp_path, rng), field, value)
    report = spectra.audit(written.tuned, written.base)
    assert len(report.layers) == 2
    assert [item["kind"] for item in report.skipped if item["name"] == f"adapter_config.json: {field}"] == ["no_update"]


def with_option(written, field, value):
    config = json.loads((written.tuned / "adapter_config.json").read_text())
    (written.tuned / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    return written


@pytest.mark.parametrize("dialect", ["peft LoRA", "peft LoHa"])
def test_an_option_is_ignored_where_the_user_says_so(tmp_path, capsys, rng, dialect):
    written = with_option(DIALECTS[dialect](tmp_path, rng), "from_another_tool", 3)
    code, _, err = audit(capsys, written.tuned, "--base", written.base)
    assert code == 2
    assert "--ignore-option from_another_tool" in err
    code, _, err = audit(capsys, written.tuned, "--base", written.base, "--ignore-option", "from_another_tool")
    assert (code, err) == (0, "")
    report = spectra.audit(written.tuned, written.base, ignore_options="from_another_tool")
    assert report.settings["ignore_options"] == ["from_another_tool"]
    for name, why in (
        ("r", "says how the factors are meant"),
        ("use_qalora", "says how"),
        ("nothing", "has no option"),
    ):
        with pytest.raises(UsageError, match=why):
            spectra.audit(written.tuned, written.base, ignore_options=name)


# Forms: nunchux-ai/nunchaku#245, Comfy-Org/ComfyUI#8922, modelscope/DiffSynth-Studio#886, Comfy-Org/ComfyUI#12165.


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dialect", ["kohya", "peft LoRA", "diffusers", "xlabs", "peft LoHa"])
def test_factors_of_eight_bits(tmp_path, rng, dialect, dtype):
    written = DIALECTS[dialect](tmp_path, rng)
    eight = {}
    for name, value in _tensors(written.file).items():
        eight[name] = value if name.endswith("alpha") else value.to(dtype)
    save_file({name: value.float() for name, value in eight.items()}, written.file)
    expected = spectra.audit(written.tuned, written.base).to_dict(canonical=True)["layers"]
    save_file(eight, written.file)
    assert spectra.audit(written.tuned, written.base).to_dict(canonical=True)["layers"] == expected


def _tensors(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_a_change_of_the_modulation_has_no_spectrum(tmp_path, rng):
    base = write(tmp_path / "base" / "wan.safetensors", {"blocks.0.self_attn.q.weight": drawn(rng, 16, 16),
                                                         "blocks.0.modulation": drawn(rng, 1, 6, 16)})  # fmt: skip
    A, B = factors(rng)
    module = "diffusion_model.blocks.0.self_attn.q"
    tuned = write(tmp_path / "tuned.safetensors", {
        f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.diff_b": drawn(rng, 16),
        "diffusion_model.blocks.0.diff_m": drawn(rng, 1, 6, 16),
    })  # fmt: skip
    report = spectra.audit(tuned, base)
    assert report.coverage.without_spectrum == 2
    assert not report.coverage.is_partial


def test_a_language_models_factors_without_a_config_are_refused(tmp_path, capsys, rng):
    """Their alpha is not known, whatever tools of image models do."""
    written = DIALECTS["diffsynth"](tmp_path, rng)
    A, B = factors(rng)
    for module in (Q, f"base_model.model.{Q}"):
        keys = {f"{module}.lora_A.default.weight": A, f"{module}.lora_B.default.weight": B}
        file = write(tmp_path / "lora.safetensors", keys)
        code, _, err = audit(capsys, file, "--base", written.base)
        assert code == 2
        assert "alpha is not known" in err
    llama = DIALECTS["full"](tmp_path / "llama", rng).base
    code, _, err = audit(capsys, written.tuned, "--base", llama)
    assert code == 2
    assert "its alpha is not known" in err


def test_projections_of_an_image_model_whose_base_has_them_in_one(tmp_path, capsys, rng):
    W0 = drawn(rng, 48, 16)
    base = write(tmp_path / "base" / "z_image.safetensors", {"layers.0.attention.qkv.weight": W0})
    for dotted in (True, False):
        tensors: Tensors = {}
        for part in ("to_q", "to_k", "to_v"):
            A, B = factors(rng)
            module = f"diffusion_model.layers.0.attention.{part}" if dotted else f"lora_unet_layers_0_attention_{part}"
            tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B}
        tuned = write(tmp_path / "tuned.safetensors", tensors)
        code, _, err = audit(capsys, tuned, "--base", base)
        assert code == 2
        assert "together with others in 'layers.0.attention.qkv.weight'" in err
        assert "--split-fused" in err
        assert "wrong base" not in err
        report = spectra.audit(tuned, base, split_fused=True)
        assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["k_proj", "q_proj", "v_proj"]
        for part, layer in zip("kqv", report.layers, strict=True):
            at = 16 * "qkv".index(part)
            module = next(name for name in tensors if f"to_{part}" in name).rpartition(".lora")[0]
            dW = tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]
            ratio = np.linalg.norm(dW) / np.linalg.norm(W0[at : at + 16])
            assert layer.measures["update_norm_relative"] == pytest.approx(ratio, rel=1e-4)


def test_the_linear_experts_of_gpt_oss_on_the_stacked_base(tmp_path, rng):
    stacks = {"gate_up_proj": drawn(rng, 2, 16, 24), "down_proj": drawn(rng, 2, 12, 16)}
    home = "model.layers.0.mlp.experts"
    config = {"model_type": "gpt_oss", "hidden_size": 16}
    base = write(tmp_path / "base" / "model.safetensors",
                 {f"{home}.{name}": value for name, value in stacks.items()}, config=config).parent  # fmt: skip
    tensors: Tensors = {}
    expected = {}
    for part, (outputs, inputs) in {"gate_up_proj": (24, 16), "down_proj": (16, 12)}.items():
        for expert in (0, 1):
            A, B = drawn(rng, 2, inputs), drawn(rng, outputs, 2)
            module = f"base_model.model.{home}.{part}s.{expert}"
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            expected[f"{home}.{part}s.{expert}"] = np.linalg.norm(B @ A) / np.linalg.norm(stacks[part][expert])
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    tuned = write(tmp_path / "tuned" / "adapter_model.safetensors", tensors, adapter_config=peft).parent
    found = {layer.name: layer.measures["update_norm_relative"] for layer in spectra.audit(tuned, base).layers}
    assert found == pytest.approx(expected, rel=1e-4)


def test_files_of_epochs_are_several_fine_tunes(tmp_path, capsys, rng):
    written = DIALECTS["kohya"](tmp_path, rng)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("mine-000010", "mine-000002", "mine"):
        (folder / f"{name}.safetensors").write_bytes(written.file.read_bytes())
    code, out, _ = audit(capsys, folder, "--base", written.base)
    assert code == 0
    assert [row.split()[0].rpartition("/")[2] for row in out.splitlines()[1:4]] == [
        "mine-000002.safetensors", "mine-000010.safetensors", "mine.safetensors"]  # fmt: skip
    (folder / "another.safetensors").write_bytes(written.file.read_bytes())
    code, _, err = audit(capsys, folder, "--base", written.base)
    assert code == 2
    assert "several weight files and no index" in err


@pytest.mark.parametrize(
    ("keys", "config", "said"),
    [
        (("model.q.A", "model.q.B"), {"rank": 8, "alpha": 0.1, "dropout": 0.0}, "an adapter of mlx-vlm"),
        (("layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"), None,
         "a LoRA of mistral-finetune"),
        (("single_blocks.0.processor.qkv_lora.down.weight", "double_blocks.0.processor.qkv_lora1.down.weight"), None,
         "XLabs adds what it trains in single blocks"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_name(tmp_path, capsys, rng, keys, config, said):
    base = DIALECTS["full"](tmp_path, rng).base
    tensors = {key: drawn(rng, 4, 4) for key in keys}
    if config is None:
        tuned = write(tmp_path / "lora.safetensors", tensors)
    else:
        tuned = write(tmp_path / "mlx" / "adapters.safetensors", tensors, adapter_config=config).parent
    code, out, err = audit(capsys, tuned, "--base", base)
    assert (code, out) == (2, "")
    assert said in err


# The wrong base is asked about only where nothing else is known.


@pytest.mark.parametrize(
    ("module", "there", "said"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj", "together with others in"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.attention.q_proj", "is this the wrong base?"),
        ("model.layers.0.inner.self_attn.q_proj", "model.layers.0.self_attn.q_proj", "without 'inner' in its name"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.query", "as other writers call this"),
        ("model.layers.0.attn.to_out.0", "model.layers.0.attn.o_proj", "as other writers call this"),
        ("transformer.h.0.mlp", "model.layers.0.mlp.fc", "is this the wrong base?"),
        ("down_blocks.0.attn.to_q", "input_blocks.1.1.attn.to_k", "the base names its U-Net as LDM's checkpoints do"),
    ],
)
def test_what_is_said_of_a_weight_that_is_not_there(tmp_path, make_base, make_adapter, rng, module, there, said):
    base = make_base({f"{there}.weight": drawn(rng, 16, 16)})
    A, B = factors(rng)
    tuned = make_adapter({module: (B, A)})
    with pytest.raises(WrongBaseError) as refused:
        spectra.audit(tuned, base)
    assert said in str(refused.value)
    assert ("wrong base" in str(refused.value)) == ("wrong base" in said)


# The base that the config names.


def with_claim(written, claimed):
    return with_option(written, "base_model_name_or_path", claimed)


def test_another_base_than_the_config_names_is_said(tmp_path, capsys, rng, monkeypatch):
    written = with_claim(DIALECTS["peft LoRA"](tmp_path, rng), "org/name")
    _, out, _ = audit(capsys, written.tuned, "--base", written.base, "--local-files-only")
    said = "note: the adapter's config names 'org/name' as its base; whether this is that model is not known"
    assert said in out
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in written.base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with_claim(written, "../copy")
    assert "the same values in the 3 tensors that were compared" in audit(
        capsys, written.tuned, "--base", written.base)[1]  # fmt: skip
    tensors = _tensors(copy / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, copy / "model.safetensors")
    out = audit(capsys, written.tuned, "--base", written.base)[1]
    assert "another state of this one: 'model.norm.weight' has other values there" in out
    save_file(tensors | {"more.weight": tensors["model.norm.weight"].clone()}, copy / "model.safetensors")
    assert "that is another model: 'more.weight' is only in" in audit(
        capsys, written.tuned, "--base", written.base)[1]  # fmt: skip
    with_claim(written, "/on/another/machine")
    assert "config names" not in audit(capsys, written.tuned, "--base", written.base)[1]


def test_what_an_adapter_stores_whole_shows_another_base(tmp_path, capsys, rng):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    name = "base_model.model.model.embed_tokens.weight"
    changed(written, lambda tensors: tensors.update({name: drawn(rng, 24, 16)}))
    _, out, _ = audit(capsys, written.tuned, "--base", written.base)
    assert "model.embed_tokens: what the adapter stores whole differs from the base's by 1." in out


# How partial reports look elsewhere.


def test_every_format_says_it_first(tmp_path, capsys, rng):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    pickled(written.tuned / "non_lora_trainables.bin", {"w": drawn(rng, 2, 2)})
    arguments = (written.tuned, "--base", written.base)
    said = "1 of 3 updates was not looked at"
    out = json.loads(audit(capsys, *arguments, "--format", "json")[1])
    assert out["summary"]["coverage"] == {
        "found": 3, "analysed": 2, "failed": 0, "left_out": 0, "without_spectrum": 0, "new": 0, "not_placed": 0,
        "not_read": 1, "share_of_parameters": None,
    }  # fmt: skip
    log = json.loads(audit(capsys, *arguments, "--format", "sarif")[1])["runs"][0]
    first = log["results"][0]
    assert first["ruleId"] == "updates-not-looked-at"
    assert first["level"] == "error"
    assert first["message"]["text"].startswith(said)
    assert log["invocations"][0]["exitCode"] == 2
    assert any(said in item["message"]["text"] for item in log["invocations"][0]["toolExecutionNotifications"])
    accepted = json.loads(audit(capsys, *arguments, "--format", "sarif", "--allow-partial")[1])["runs"][0]
    assert accepted["results"][0]["level"] == "warning"
    report = spectra.audit(written.tuned, written.base)
    card = report.to_model_card()
    assert card.index(said) < card.index("ntruder dimensions")
    page = report.to_html()
    assert f"<h2>Partial: {said}</h2>" in page
    assert said in report._repr_html_()
    _, out, _ = audit(capsys, written.tuned, written.tuned, "--base", written.base)
    assert out.count(f"(partial: {said})") == 2
    code = main(["ranks", str(written.tuned), "--base", str(written.base)])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out.startswith(f"Partial: {said}")
    assert main(["ranks", str(written.tuned), "--base", str(written.base), "--allow-partial", "--quiet"]) == 0
    capsys.readouterr()
    code = main(["compare", str(written.tuned), "--base", str(written.base), "--quick", "--quiet"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out.startswith("Partial: of tuned, ")


def test_it_outranks_a_gate(tmp_path, capsys, rng):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    arguments = (written.tuned, "--base", written.base, "--fail-above", "0")
    assert audit(capsys, *arguments)[0] == 1, "the control"
    pickled(written.tuned / "trainable_params.bin", {"w": drawn(rng, 2, 2)})
    assert audit(capsys, *arguments)[0] == 2
    assert audit(capsys, *arguments, "--allow-partial")[0] == 1


def test_a_report_that_was_saved_says_it_again(tmp_path, rng):
    written = DIALECTS["peft LoRA"](tmp_path, rng)
    pickled(written.tuned / "trainable_params.bin", {"w": drawn(rng, 2, 2)})
    report = spectra.audit(written.tuned, written.base)
    assert spectra.Report.from_dict(json.loads(report.to_json())).coverage == report.coverage
    assert report.to_text().startswith("Partial: 1 of 3 updates was not looked at.\n")


# The right values: what the reports' own inputs give by the definition, in float64.


def falling(rng, rows=96, columns=96):
    """A base weight with a falling spectrum, on which a LoRA plants intruders."""
    p = min(rows, columns)
    U, V = (np.linalg.qr(rng.normal(size=(size, p)))[0] for size in (rows, columns))
    return ((U * (6 * 0.97 ** np.arange(p))) @ V.T).astype(np.float32)


def strong(rng, rows=96, columns=96):
    """(down, up) of rank 3 and size 7."""
    down, up = rng.normal(size=(3, columns)) / columns**0.5, rng.normal(size=(rows, 3))
    return down.astype(np.float32), (up * 7 / np.linalg.norm(up @ down, 2)).astype(np.float32)


def defined(W0, W1):
    """The indices of the intruders by the definition."""
    U0, U1 = (np.linalg.svd(np.float64(W), full_matrices=False)[0] for W in (W0, W1))
    return tuple(np.flatnonzero(np.abs(U0.T @ U1[:, :10]).max(0) < 0.5).tolist())


def a_unet_as_ldm(home, rng):
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    names = {
        f"model.diffusion_model.input_blocks.{at}.1.transformer_blocks.0.attn1.to_q":
        f"lora_unet_down_blocks_{at // 3}_attentions_0_transformer_blocks_0_attn1_to_q" for at in (1, 4)
    } | {f"cond_stage_model.transformer.{text}": f"lora_te_{text.replace('.', '_')}"}  # fmt: skip
    base = {f"{name}.weight": falling(rng) for name in names}
    tensors: Tensors = {}
    expected = {}
    for name, own in names.items():
        A, B = strong(rng)
        tensors |= {f"{own}.lora_down.weight": A, f"{own}.lora_up.weight": B, f"{own}.alpha": np.array([3], np.float32)}
        expected[name] = defined(base[f"{name}.weight"], base[f"{name}.weight"] + np.float64(B) @ A)
    return write(home / "base" / "v1.safetensors", base), write(home / "tuned.safetensors", tensors), expected, {}


def eight_bits(home, rng):
    name, W0 = "double_blocks.0.img_attn.proj", falling(rng)
    A, B = (torch.from_numpy(value).to(torch.float8_e4m3fn) for value in strong(rng))
    own = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{own}.lora_down.weight": A, f"{own}.lora_up.weight": B}, home / "tuned.safetensors")
    expected = {name: defined(W0, W0 + B.double().numpy() @ A.double().numpy())}
    return write(home / "base" / "flux.safetensors", {f"{name}.weight": W0}), home / "tuned.safetensors", expected, {}


def a_modulation(home, rng):
    name, W0 = "blocks.0.self_attn.q", falling(rng)
    A, B = strong(rng)
    tensors = {
        f"diffusion_model.{name}.lora_down.weight": A,
        f"diffusion_model.{name}.lora_up.weight": B,
        f"diffusion_model.{name}.diff_b": drawn(rng, 96),
        "diffusion_model.blocks.0.diff_m": drawn(rng, 1, 6, 96),
    }
    base = write(home / "base" / "wan.safetensors", {f"{name}.weight": W0, "blocks.0.modulation": drawn(rng, 1, 6, 96)})
    return base, write(home / "tuned.safetensors", tensors), {name: defined(W0, W0 + np.float64(B) @ A)}, {}


def an_adapters_name(home, rng, prefix=""):
    name, W0 = "transformer_blocks.0.attn.to_q", falling(rng)
    A, B = strong(rng)
    tensors = {f"{prefix}{name}.lora_A.default.weight": A, f"{prefix}{name}.lora_B.default.weight": B}
    base = write(home / "base" / "diffusion_pytorch_model.safetensors", {f"{name}.weight": W0},
                 config={"_class_name": "QwenImageTransformer2DModel"}).parent  # fmt: skip
    return base, write(home / "tuned.safetensors", tensors), {name: defined(W0, W0 + np.float64(B) @ A)}, {}


def after_a_prefix(home, rng):
    return an_adapters_name(home, rng, "transformer.")


def a_fused_matrix(home, rng):
    W0, expected = falling(rng, 3 * 96), {}
    tensors: Tensors = {}
    for at, part in enumerate("qkv"):
        A, B = strong(rng)
        own = f"diffusion_model.layers.0.attention.to_{part}"
        tensors |= {f"{own}.lora_A.weight": A, f"{own}.lora_B.weight": B}
        third = W0[96 * at : 96 * (at + 1)]
        expected[f"layers.0.attention.{part}_proj"] = defined(third, third + np.float64(B) @ A)
    base = write(home / "base" / "z.safetensors", {"layers.0.attention.qkv.weight": W0})
    return base, write(home / "tuned.safetensors", tensors), expected, {"split_fused": True}


def peft_folder(home, rng, wrapper="", **config):
    base: Tensors = {}
    tensors: Tensors = {}
    expected = {}
    for i in (0, 1):
        name, (A, B) = f"model.layers.{i}.self_attn.q_proj", strong(rng)
        base[f"{name}.weight"] = falling(rng)
        own = f"base_model.model.{name.replace(f'layers.{i}.', f'layers.{i}.{wrapper}')}"
        tensors |= {f"{own}.lora_A.weight": A, f"{own}.lora_B.weight": B}
        expected[name] = defined(base[f"{name}.weight"], base[f"{name}.weight"] + np.float64(B) @ A)
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 3} | config
    tuned = write(home / "tuned" / "adapter_model.safetensors", tensors, adapter_config=values).parent
    return write(home / "base" / "model.safetensors", base, config={"model_type": "llama"}).parent, tuned, expected, {}


def wrapped_by_fsdp(home, rng):
    return peft_folder(home, rng, "_fsdp_wrapped_module.")


def with_an_inert_option(home, rng):
    return peft_folder(home, rng, lorap_lr_ratio=16.0)


def beside_a_stale_config(home, rng):
    name, W0 = "model.layers.0.self_attn.q_proj", falling(rng)
    A, B = strong(rng)
    W1 = (W0 + np.float64(B) @ A).astype(np.float32)
    base = write(home / "base" / "model.safetensors", {f"{name}.weight": W0}, config={"model_type": "llama"}).parent
    stale = {"peft_type": "LORA", "r": 3}
    tuned = write(home / "tuned" / "model.safetensors", {f"{name}.weight": W1}, config={"model_type": "llama"},
                  adapter_config=stale).parent  # fmt: skip
    return base, tuned, {name: defined(W0, W1)}, {}


@pytest.mark.parametrize(
    "case",
    [a_unet_as_ldm, eight_bits, a_modulation, an_adapters_name, after_a_prefix, a_fused_matrix, wrapped_by_fsdp,
     with_an_inert_option, beside_a_stale_config],
)  # fmt: skip
def test_what_was_misread_has_the_definitions_intruders(tmp_path, rng, case):
    base, tuned, expected, options = case(tmp_path, rng)
    report = spectra.audit(tuned, base, **options)
    assert {layer.name: layer.intruder_indices for layer in report.layers} == expected
    assert all(expected.values()), "there is something to find"
    assert not report.coverage.is_partial
