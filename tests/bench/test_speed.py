import pytest
import torch

import subquad
from subquad import Shape
from subquad.bench import speed
from subquad.bench.choice import Choice
from subquad.bench.machine import peak_bytes
from subquad.bench.mechanisms import BASELINE, bench, sides
from subquad.checks import InputError


def counted(cache):
    """Bytes of every distinct tensor reachable from a cache's layers, found without asking the cache."""
    found = {}

    def walk(thing, depth=0):
        if isinstance(thing, torch.Tensor):
            found[thing.data_ptr()] = thing.numel() * thing.element_size()
        elif isinstance(thing, dict):
            for inner in thing.values():
                walk(inner, depth)
        elif isinstance(thing, list | tuple):
            for inner in thing:
                walk(inner, depth)
        elif hasattr(thing, "__dict__") and depth < 3:
            walk({k: v for k, v in vars(thing).items() if k != "length"}, depth + 1)

    walk(cache.layers)
    return sum(found.values())


def test_softmax_keeps_keys_and_values(llama):
    per_token = 4 * 2 * 2 * 8 * 4  # layers, k and v, heads, width, float32
    found = speed.timings(llama, torch.arange(200), (64, 128), decoded=2, repeats=1)
    assert [one.cache_bytes for one in found] == [64 * per_token, 128 * per_token]
    assert speed.kept_bytes(llama, [64, 65536]) == {64: 64 * per_token, 65536: 65536 * per_token}
    assert found[0].tokens_per_s == 64 / found[0].prefill_s > 0 and found[0].decode_ms > 0


@pytest.mark.parametrize(
    "name, options", [("sliding-window", {"window": 16, "sinks": 2}), ("lolcats", {}), ("lightning", {}), ("deltanet", {})]
)
def test_the_cards_bytes_are_those_of_a_real_cache(llama, name, options):
    subquad.swap(llama, name, layers=[0, 2, 3], **options)
    with torch.no_grad():
        for length in (100, 300):
            cache = llama(input_ids=torch.randint(0, 257, (1, length)), use_cache=True).past_key_values
            assert speed.cache_bytes(cache) == counted(cache) == speed.kept_bytes(llama, [length])[length]


def test_layers_with_a_window_of_their_own_keep_no_more_than_it():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    kept = speed.kept_bytes(model, [1024, 65536])
    assert kept[1024] == kept[65536] <= 2 * 17 * 2 * 2 * 8 * 4
    assert speed.attention_layers(model)[0].card.name == "sliding-window"


def test_parameters_are_counted_once_and_flops_are_two_a_weight(llama):
    width, inner, vocabulary, tokens = 32, 48, 257, 100
    layer = width * (32 + 16 + 16) + 32 * width + 3 * width * inner
    assert speed.parameters(llama) == 4 * (layer + 2 * width) + width + vocabulary * width  # tied: the embedding counts once
    linear = 2 * tokens * (4 * layer + vocabulary * width)
    attention = 4 * subquad.card("softmax").flops(Shape(tokens, 4, 8, 2, itemsize=4))
    assert speed.prefill_flops(llama, tokens) == pytest.approx(linear + attention)


def test_a_sentence_says_what_is_kept(llama):
    subquad.swap(llama, "sliding-window", layers=[0, 1, 2], window=16, sinks=2)
    sentence = speed.kept_sentence(llama)
    total = speed.kept_bytes(llama, [65536])[65536]
    assert sentence.startswith(f"At 65,536 tokens it keeps {speed.bytes_text(total)} per sequence:")
    assert "in 3 layers, sliding-window keeps" in sentence and "in 1 layer, softmax keeps" in sentence


@pytest.mark.parametrize("count, words", [(7, "7 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (450 * 2**20, "450 MiB")])
def test_bytes_in_words(count, words):
    assert speed.bytes_text(count) == words


def test_peak_memory_counts_every_allocation():
    a = torch.randn(512, 512)
    assert peak_bytes(lambda: (a + a) + (a * a), "cpu") == 3 * a.nbytes  # two summands and their sum live at once
    assert peak_bytes(lambda: a.add_(1), "cpu") < 1024


def test_bench_measures_beside_torch_in_the_same_run():
    points = bench([("softmax", {}), ("sliding-window", {"window": 16})], [64, 128], heads=2, head_dim=16, backward=True, budget=0.01)
    assert [(p.mechanism, p.tokens) for p in points] == [
        (name, n) for n in (64, 128) for name in (BASELINE, "softmax", "sliding-window:window=16")
    ]  # fmt: skip
    for base, one in ((points[0], points[1]), (points[3], points[5])):
        assert one.speedup == pytest.approx(base.forward_ms / one.forward_ms)
        assert one.train_speedup == pytest.approx(base.train_ms / one.train_ms)
        assert one.forward_bytes >= one.tokens * 2 * 16 * 4  # the output at the least
        assert one.train_bytes >= 3 * one.tokens * 2 * 16 * 4  # three gradients


def test_bench_makes_grids_as_square_as_they_get():
    assert [sides(n) for n in (64, 48, 7, 1)] == [(8, 8), (6, 8), (1, 7), (1, 1)]
    (_, rala) = bench([("rala", {})], [36], heads=2, head_dim=16, budget=0.01)
    assert rala.error is None and rala.forward_ms > 0


def test_bench_refuses_before_it_measures():
    with pytest.raises(InputError, match="nearest: softmax"):
        bench([("sofmax", {})], [64])
    with pytest.raises(InputError, match="lengths"):
        bench([("softmax", {})], [0])


def test_a_choice_is_read_and_written_alike():
    from subquad.bench.choice import integers, parse_choice, parse_layers, pick_device

    assert parse_choice("--to", "sliding-window:window=64,sinks=4") == Choice("sliding-window", {"window": 64, "sinks": 4})
    assert parse_choice("--to", "sliding-window:window=64,sinks=4").label == "sliding-window:window=64,sinks=4"
    assert [parse_layers(t) for t in ("all", "3:1", "0,4-6,2", "-1,0")] == ["all", "3:1", [0, 2, 4, 5, 6], [-1, 0]]
    assert integers("--tokens", "1,22") == [1, 22]
    for call, part in (
        (lambda: parse_choice("--to", "slidin-window"), "nearest: sliding-window"),
        (lambda: parse_choice("--to", "sliding-window:windw=3"), "nearest: window"),
        (lambda: parse_choice("--to", "sliding-window:64"), "NAME:option=value"),
        (lambda: parse_choice("--to", "sliding-window:window=64,window=32"), "window twice"),
        (lambda: parse_layers("some"), "--layers: got 'some'"),
        (lambda: parse_layers("7-4"), "--layers: got '7-4'"),
        (lambda: parse_layers("-3-4"), "--layers: got '-3-4'"),
        (lambda: integers("--tokens", "1,x"), "positive integers"),
        (lambda: pick_device("cuda:9"), "--device"),
        (lambda: pick_device("tpu"), "cpu or cuda"),
    ):
        with pytest.raises(InputError, match=part):
            call()
