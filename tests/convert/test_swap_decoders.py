"""Swapped decoders of transformers: exact attention swapped in changes nothing; a recurrent one agrees with itself everywhere."""

import copy

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.swap import swapped

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.filterwarnings("ignore")]


def tokens(batch=2, length=12):
    return torch.randint(5, 97, (batch, length))


def left_padded(ids, padding):
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["all", "1:1"])
def test_exact_attention_changes_nothing(decoder, family, layers):
    model, ids = decoder(family), tokens()
    padded, mask = left_padded(ids, [5, 0])
    whole, with_padding = logits(model, ids), logits(model, padded, attention_mask=mask)
    kwargs = {"attention_mask": mask, "max_new_tokens": 6}
    ways = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]

    def generate():
        found = []
        for way in ways:
            torch.manual_seed(3)
            found.append(model.generate(padded, **kwargs, **way))
        return found

    before = generate()
    assert subquad.swap(model, "toy-softmax", layers=layers) is model
    assert len(swapped(model)) == (4 if layers == "all" else 2)
    close(logits(model, ids), whole)
    close(logits(model, padded, attention_mask=mask)[mask == 1], with_padding[mask == 1])
    for old, new in zip(before, generate()):
        assert torch.equal(old, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_changes_what_it_should(decoder, family):
    model, ids = decoder(family), tokens()
    before = logits(model, ids)
    subquad.swap(model, "toy-linear", layers=[1])
    assert (logits(model, ids) - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_exact(decoder, family):
    model, ids = decoder(family), tokens()
    classes = [type(model), type(model.model), type(model.config)]
    modules = [layer.self_attn for layer in model.model.layers]
    names, before = list(model.state_dict()), logits(model, ids)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    subquad.swap(model, "toy-linear", layers="3:1")
    assert all(name in model.state_dict() for name in names)
    assert "model.layers.0.self_attn.mechanism.gate.weight" in model.state_dict()
    model.train()
    subquad.restore(model)
    assert model.model.layers[0].self_attn.training
    model.eval()
    assert [type(model), type(model.model), type(model.config)] == classes
    assert all(layer.self_attn is module for layer, module in zip(model.model.layers, modules))
    assert list(model.state_dict()) == names and not hasattr(model.config, "subquad")
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


def test_attentions_of_kept_layers_and_of_all_after_restore(decoder):
    model, ids = decoder(attn_implementation="eager"), tokens()
    with torch.no_grad():
        subquad.swap(model, "toy-linear", layers=[0, 1])
        assert len(model(ids, output_attentions=True).attentions) == 2
        subquad.restore(model)
        assert len(model(ids, output_attentions=True).attentions) == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_with_cache_without_and_padded(decoder, family, layers):
    model, ids = subquad.swap(decoder(family), "toy-linear", layers=layers), tokens(2, 14)
    whole = logits(model, ids, use_cache=False)
    with torch.no_grad():
        out = model(ids[:, :6])
        parts = [out.logits]
        for start, stop in ((6, 10), (10, 11), (11, 12), (12, 14)):
            out = model(ids[:, start:stop], past_key_values=out.past_key_values)
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)
    assert out.past_key_values.get_seq_length() == 14
    alone = logits(model, ids[:1, 5:])
    padded, mask = left_padded(ids, [5, 0])
    close(logits(model, padded, attention_mask=mask)[0, 5:], alone[0])
    right = torch.cat([ids[:1, 5:], ids.new_zeros(1, 5)], 1)
    mask_right = (torch.arange(14) < 9).long()[None]
    close(logits(model, torch.cat([right, ids[1:]]), attention_mask=torch.cat([mask_right, mask[1:]]))[0, :9], alone[0])
    with torch.no_grad():  # left padding, in two calls that go on from a cache, the first chunk of row 0 nothing but padding
        out = model(padded[:, :4], attention_mask=mask[:, :4])
        out = model(padded[:, 4:10], attention_mask=mask[:, :10], past_key_values=out.past_key_values)
        last = model(padded[:, 10:], attention_mask=mask, past_key_values=out.past_key_values)
    close(last.logits[0], alone[0, -4:])
    close(last.logits[1], whole[1, -4:])


def test_generate_in_every_way(decoder):
    model, ids = subquad.swap(decoder(), "toy-linear", layers="3:1"), tokens(2, 12)
    padded, mask = left_padded(ids, [5, 0])
    greedy = {"max_new_tokens": 10, "do_sample": False}
    batch = model.generate(padded, attention_mask=mask, **greedy)
    assert torch.equal(batch[0, 12:], model.generate(ids[:1, 5:], **greedy)[0, 7:])
    assert torch.equal(batch[1], model.generate(ids[1:], **greedy)[0])
    assert torch.equal(batch, model.generate(padded, attention_mask=mask, prefill_chunk_size=4, **greedy))
    assert torch.equal(batch, model.generate(padded, attention_mask=mask, use_cache=False, **greedy))
    beams = {"num_beams": 3, "num_return_sequences": 2, **greedy}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    first = model.generate(ids, **{**greedy, "max_new_tokens": 4}, return_dict_in_generate=True)
    onward = model.generate(first.sequences, past_key_values=first.past_key_values, **{**greedy, "max_new_tokens": 6})
    assert torch.equal(onward, model.generate(ids, **greedy))


@pytest.mark.parametrize("length", [12, 300])
def test_assisted_generation(decoder, length):
    """Drafts are taken back: by a swapped model that checks them, and by one that makes them; prompts short and long."""
    plain = decoder(initializer_range=0.02)
    target = subquad.swap(copy.deepcopy(plain), "toy-linear", layers=[0, 1, 3])
    ids = tokens(1, length)
    greedy = {"max_new_tokens": 30, "do_sample": False}
    for model, assistant in ((target, plain), (plain, target)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **greedy), model.generate(ids, **greedy))
    repeated = ids.repeat(1, 2)
    assert torch.equal(target.generate(repeated, prompt_lookup_num_tokens=5, **greedy), target.generate(repeated, **greedy))


def test_sliding_layers_that_are_kept(decoder):
    """Mistral's kept layers keep their window, in masks and in the cache; Qwen2's swapped ones get the attention asked for."""
    mistral, ids = decoder("mistral", sliding_window=5), tokens(2, 16)
    subquad.swap(mistral, "toy-linear", layers=[0, 2])
    whole = logits(mistral, ids, use_cache=False)
    with torch.no_grad():
        out = mistral(ids[:, :9])
        parts = [out.logits]
        for at in range(9, 16):
            out = mistral(ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)
    assert out.past_key_values.layers[1].keys.shape[2] == 4 and out.past_key_values.is_sliding == [False, True, False, True]
    greedy = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(mistral.generate(ids, use_cache=False, **greedy), mistral.generate(ids, **greedy))
    qwen = decoder("qwen2", use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"] * 2)
    before = logits(qwen, ids)
    subquad.swap(qwen, "toy-softmax", layers=[0, 2])
    close(logits(qwen, ids), before)
    assert torch.equal(logits(qwen, ids, use_cache=False), logits(qwen, ids, use_cache=True))


def test_packed_sequences_by_position_ids(decoder):
    model, ids = subquad.swap(decoder(), "toy-linear", layers=[0, 1, 3]), tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    close(packed[:, :5], logits(model, ids[:, :5]))
    close(packed[:, 5:], logits(model, ids[:, 5:]))


def test_the_cache_can_be_reordered_repeated_selected_and_cropped(decoder):
    from subquad.convert.cache import SubquadCache

    model, ids = subquad.swap(decoder(), "toy-linear", layers=[0, 1, 3]), tokens(3, 10)
    whole = logits(model, ids)

    def after(change):
        cache = SubquadCache(model)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            change(cache)
        return cache

    rows = torch.tensor([2, 0, 0])
    cache = after(lambda cache: cache.reorder_cache(rows))
    close(logits(model, ids[rows, 6:], past_key_values=cache), whole[rows, 6:])
    cache = after(lambda cache: cache.batch_repeat_interleave(2))
    close(logits(model, ids[:, 6:].repeat_interleave(2, 0), past_key_values=cache), whole[:, 6:].repeat_interleave(2, 0))
    cache = after(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    close(logits(model, ids[1:2, 6:], past_key_values=cache), whole[1:2, 6:])
    cache = after(lambda cache: (cache.activate_past_recording(), model(ids[:, 6:9], past_key_values=cache), cache.crop(-2)))
    assert cache.get_seq_length() == 7
    close(logits(model, ids[:, 7:], past_key_values=cache), whole[:, 7:])
    with pytest.raises(InputError, match="recorded"):
        after(lambda cache: cache.crop(-2))


def test_a_cache_can_be_reset_and_moved(decoder):
    from subquad.convert.cache import SubquadCache

    model, ids = subquad.swap(decoder(), "toy-linear"), tokens()
    cache = SubquadCache(model)
    whole = logits(model, ids, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    logits(model, ids[:, :5], past_key_values=cache)
    for layer in copy.deepcopy(cache).layers:
        layer.offload(), layer.prefetch()
    close(logits(model, ids[:, 5:], past_key_values=cache), whole[:, 5:])


def test_a_recorded_prompt_can_be_cropped_from_the_first_call(decoder):
    from subquad.convert.cache import ROLLBACK, SubquadCache

    model = subquad.swap(decoder(), "toy-linear")
    for length in (10, ROLLBACK + 20):
        ids, cache = tokens(1, length), SubquadCache(model)
        cache.activate_past_recording()
        logits(model, ids, past_key_values=cache)
        cache.crop(-8)
        close(logits(model, ids[:, -8:], past_key_values=cache), logits(model, ids, use_cache=False)[:, -8:])


def test_a_fixed_state_does_not_grow(decoder):
    model, ids = subquad.swap(decoder(), "toy-linear"), tokens(1, 8)
    sizes = []
    for count in (5, 60):
        out = model.generate(ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True)
        sizes.append(out.past_key_values.nbytes)
    assert sizes[0] == sizes[1] == 4 * 4 * 8 * 8 * 4  # layers · heads · D · V · float32
    growing = subquad.swap(decoder(), "toy-linear", layers=[0, 1, 2])
    out = growing.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.nbytes == 3 * 4 * 8 * 8 * 4 + 2 * 12 * 2 * 8 * 4


def test_training_reaches_projections_and_mechanism(decoder):
    model, ids = decoder(), tokens()
    subquad.swap(model, "toy-linear").train()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.abs().max() > 0 for name, g in plain.items() if "self_attn" in name and "k_proj.bias" not in name)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    padded, mask = left_padded(ids, [0, 0])
    model(padded, attention_mask=mask, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, plain[name], atol=1e-6)


def test_hidden_states_and_the_rest_of_the_output(decoder):
    model, ids = decoder(), tokens()
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states
        subquad.swap(model, "toy-softmax", layers=[1])
        after = model(ids, output_hidden_states=True).hidden_states
    assert len(before) == len(after) == 5
    for old, new in zip(before, after):
        close(new, old)


def test_heads_output_is_what_the_projection_reads(decoder):
    model, ids = decoder("qwen3"), tokens()
    read = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: read.setdefault(index, (args, kwargs)), with_kwargs=True
        )
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, index=index: read.setdefault(f"o{index}", args[0]))
    padded, mask = left_padded(ids, [4, 0])
    logits(model, padded, attention_mask=mask, use_cache=False)
    subquad.swap(model, "toy-softmax")
    for index, module in swapped(model).items():
        assert (module.path, module.projection, module.name) == (f"model.layers.{index}.self_attn", "o_proj", "toy-softmax")
        args, kwargs = read[index]
        close(module.heads_output(*args, **kwargs)[mask == 1], read[f"o{index}"][mask == 1])


def test_models_stay_apart(decoder):
    """Models that share a config object, and copies."""
    model = decoder()
    other = type(model)(model.config).eval()
    subquad.swap(model, "toy-linear", layers=[0])
    assert other.config.model_type == "llama" and not hasattr(other.config, "subquad")
    subquad.swap(model, "toy-softmax", layers=[3])
    assert model.config.subquad["layers"] == {"0": {"name": "toy-linear", "bias": 1.0}, "3": {"name": "toy-softmax", "causal": True}}
    twin, ids = copy.deepcopy(model), tokens()
    assert torch.equal(logits(twin, ids), logits(model, ids))
    subquad.restore(model)
    assert list(swapped(twin)) == [0, 3] and not swapped(model)
    subquad.restore(twin)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert twin.model.layers[0].self_attn.q_proj.weight is not model.model.layers[0].self_attn.q_proj.weight


def test_what_an_adapter_put_in_a_projections_place_stays(decoder):
    model, ids = decoder(), tokens()
    subquad.swap(model, "toy-softmax")
    module = swapped(model)[2]
    module.q_proj = torch.nn.Sequential(module.q_proj, torch.nn.Hardtanh(-0.1, 0.1))
    adapted = logits(model, ids)
    close(logits(subquad.restore(model), ids), adapted)


def test_sixteen_bit_models_keep_constants_exact(decoder):
    model = subquad.swap(decoder().to(torch.bfloat16), "toy-linear")
    mechanism = swapped(model)[0].mechanism
    assert mechanism.gate.weight.dtype == torch.bfloat16
    assert torch.equal(mechanism.constant, torch.linspace(0.3, 0.9, 4))


def test_bare_models_can_be_swapped(decoder):
    model, ids = decoder().model, tokens()
    with torch.no_grad():
        before = model(ids).last_hidden_state
        subquad.swap(model, "toy-softmax")
        close(model(ids).last_hidden_state, before)
        subquad.restore(model)
        assert torch.equal(model(ids).last_hidden_state, before)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_caches_are_refused_by_name(decoder, implementation):
    model = subquad.swap(decoder(), "toy-linear")
    with pytest.raises(InputError, match=f"cache_implementation: got '{implementation}'"):
        model.generate(tokens(), cache_implementation=implementation, max_new_tokens=2)


def test_wrong_use_is_one_line(decoder):
    from transformers import DistilBertConfig, DistilBertModel, DynamicCache

    model, ids = decoder(), tokens()
    before, config = logits(model, ids), model.config

    def refuses(message, action):
        with pytest.raises(InputError) as error:
            action()
        assert message in str(error.value) and "\n" not in str(error.value)

    refuses(
        "'toy-rows', which is bidirectional only; expected a causal mechanism for LlamaForCausalLM", lambda: subquad.swap(model, "toy-rows")
    )
    refuses("causal: got False", lambda: subquad.swap(model, "toy-softmax", causal=False))
    refuses("without a swapped layer", lambda: subquad.restore(model))
    refuses("got layer 4", lambda: subquad.swap(model, "toy-linear", layers=[4]))
    refuses("nearest: toy-linear", lambda: subquad.swap(model, None, layers={0: "toy-softmax", 1: "toy-linea"}))
    assert torch.equal(logits(model, ids), before) and model.config is config and not swapped(model)
    bert = DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, hidden_dim=8))
    refuses("2 × DistilBertSelfAttention", lambda: subquad.swap(bert, "toy-linear"))
    refuses("model: got Linear (attention modules found: none)", lambda: subquad.swap(torch.nn.Linear(2, 2), "toy-linear"))
    refuses("model: got str", lambda: subquad.swap("smollm", "toy-linear"))
    subquad.swap(model, "toy-linear", layers=[1])
    refuses("layer 1, which is swapped to 'toy-linear' already", lambda: subquad.swap(model, "toy-softmax"))
    refuses(": got DynamicCache; expected a SubquadCache", lambda: model(ids, past_key_values=DynamicCache(config=model.config)))
    refuses("attention_mask", lambda: model(ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool)))
    other = subquad.swap(decoder(), "toy-linear", layers=[2])
    refuses("layer 1 is not swapped", lambda: model(ids, past_key_values=other(ids[:, :3]).past_key_values))
    model.is_quantized = True
    refuses("quantized", lambda: subquad.swap(model, "toy-linear", layers=[0]))


@pytest.mark.parametrize(("name", "layers"), [("toy-linear", [0, 1, 3]), ("gla", "all")])
@pytest.mark.parametrize("padding", [[0, 1, 2], [6], [0, 1, 5, 11], [13]])
def test_assisted_generation_of_a_padded_prompt(decoder, name, layers, padding):
    """Padding in front, inside and at the end of a prompt, told by a mask; drafts are checked by, or made by, swapped layers."""
    plain = decoder(initializer_range=0.02)
    target = subquad.swap(copy.deepcopy(plain), name, layers=layers)
    ids, mask = tokens(1, 14), torch.ones(1, 14, dtype=torch.long)
    mask[0, padding] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    for model, assistant in ((target, plain), (plain, target)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **greedy), model.generate(ids, **greedy))


@pytest.mark.parametrize("cut", [2, 3, 5, 7, 12, 13])
def test_crop_counts_columns_and_drops_only_real_tokens(decoder, cut):
    from subquad.convert.cache import SubquadCache

    model, ids = subquad.swap(decoder(), "toy-linear", layers=[0, 1, 3]), tokens(1, 14)
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 5, 6, 9]] = 0
    cache = SubquadCache(model)
    cache.activate_past_recording()
    for start, stop in ((0, 1), (1, 8), (8, 9), (9, 10), (10, 14)):
        logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    cache.crop(cut - 14)
    assert [layer.get_seq_length() for layer in cache.layers] == [cut] * 4
    again = logits(model, ids[:, cut:], attention_mask=mask, past_key_values=cache)
    close(again[mask[:, cut:] == 1], whole[:, cut:][mask[:, cut:] == 1])
    assert cache.layers[0].state.length.tolist() == [9]


def test_crop_past_more_padding_than_is_remembered(decoder):
    from subquad.convert.cache import ROLLBACK, SubquadCache

    model, ids = subquad.swap(decoder(), "toy-linear"), tokens(1, ROLLBACK + 20)
    mask = torch.ones_like(ids)
    mask[0, 5 : ROLLBACK + 10] = 0  # five columns of padding too many
    cache = SubquadCache(model)
    cache.activate_past_recording()
    whole = logits(model, ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(InputError, match="keep at least the first 10 columns"):
        cache.crop(-ROLLBACK - 11)
    cache.crop(-ROLLBACK - 10)
    assert cache.layers[0].state.length.tolist() == [5]
    close(logits(model, ids[:, 10:], attention_mask=mask, past_key_values=cache)[:, -10:], whole[:, -10:])


def test_crop_refuses_several_rows_with_padding(decoder):
    from subquad.convert.cache import SubquadCache

    model, (ids, mask) = subquad.swap(decoder(), "toy-linear"), left_padded(tokens(), [5, 0])
    cache = SubquadCache(model)
    cache.activate_past_recording()
    logits(model, ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(InputError, match="recorded"):
        cache.crop(-2)


def test_a_mask_of_another_shape_is_refused(decoder):
    model, ids = subquad.swap(decoder(), "toy-linear", layers=[0, 1, 3]), tokens(2, 11)
    cache = model(ids[:, :6]).past_key_values
    wrong = [
        ((2, 5), 11, {}, [2, 11]),
        ((2, 16), 11, {"use_cache": False}, [2, 11]),
        ((3, 11), 11, {}, [2, 11]),
        ((1, 11), 11, {}, [2, 11]),
        ((2, 5), 5, {"past_key_values": cache}, [2, 11]),
    ]
    for shape, columns, kwargs, should in wrong:
        mask = torch.ones(shape, dtype=torch.long)
        for first in (1, 0):
            mask[0, 0] = first
            with pytest.raises(InputError) as error:
                logits(model, ids[:, -columns:], attention_mask=mask, **kwargs)
            assert "attention_mask" in str(error.value) and f"expected {should}" in str(error.value)
