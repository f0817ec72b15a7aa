import numpy as np
import pytest
import torch
from torch import nn

from kdhiera.config.evaluation import AttentiveConfig
from kdhiera.errors import UsageError
from kdhiera.evaluation.attentive import AttentivePooler, Tokens, attentive_probe
from kdhiera.evaluation.probe import linear_probe

CPU = torch.device("cpu")
SETTINGS = AttentiveConfig(heads=2, epochs=12, batch_size=32, lrs=(3e-3, 1e-2))


def pooler(width=24, heads=4, num_classes=3):
    made = AttentivePooler(
        width, heads, num_classes, generator=torch.Generator().manual_seed(0)
    ).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():  # biases and norms too
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    return made


def reference_attention(made, width=24, heads=4):
    """Torch's own, with key biases, which must not matter."""
    attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    query = made.project_query
    weights = [query.weight, made.keys, made.values.weight]
    biases = [query.bias, torch.linspace(-1, 1, width, dtype=torch.float64), made.values.bias]
    attention.load_state_dict(
        {
            "in_proj_weight": torch.cat(weights),
            "in_proj_bias": torch.cat(biases),
            "out_proj.weight": made.project_out.weight,
            "out_proj.bias": made.project_out.bias,
        }
    )
    return attention


def test_attends_as_torch_does():
    made = pooler()
    tokens = torch.randn(5, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    query = made.query.expand(5, 1, -1)
    wanted, _ = reference_attention(made)(query, tokens, tokens)
    torch.testing.assert_close(made.attend(tokens), wanted[:, 0], rtol=0, atol=1e-12)


def test_the_block_is_vjepas():
    """Query residual, normalised tokens, MLP residual, linear classifier."""
    made = pooler()
    tokens = torch.randn(3, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    normed = nn.functional.layer_norm(tokens, (24,), made.norm_tokens.weight, made.norm_tokens.bias)
    query = made.query.expand(3, 1, -1)
    x = (query + reference_attention(made)(query, normed, normed)[0])[:, 0]
    hidden = nn.functional.layer_norm(x, (24,), made.norm_query.weight, made.norm_query.bias)
    x = x + made.reduce(nn.functional.gelu(made.expand(hidden)))
    torch.testing.assert_close(made(tokens), made.classify(x), rtol=0, atol=1e-12)


def marked_tokens(count, seed):
    """One token of eight is marked and its sign is the class; another one has the opposite.

    So the mean over tokens says nothing of the class.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    tokens = rng.normal(size=(count, 1, 8, 16)) * 0.3
    tokens[..., 0] = 0
    tokens[..., 1] = 0
    places = np.array([rng.permutation(8)[:2] for _ in range(count)])
    rows = np.arange(count)
    tokens[rows, 0, places[:, 0], 0] = 3.0
    tokens[rows, 0, places[:, 0], 1] = 2 * labels - 1
    tokens[rows, 0, places[:, 1], 1] = 1 - 2 * labels
    return tokens.astype(np.float16), labels


def everything(values):
    return Tokens(values=values, rows=np.arange(len(values)))


def probe(train, validation, test, *, seed=0, settings=SETTINGS):
    return attentive_probe(
        everything(train[0]), train[1], everything(validation[0]), validation[1],
        everything(test[0]), num_classes=2, settings=settings, seed=seed, device=CPU,
    )  # fmt: skip


def test_learns_what_the_mean_over_tokens_cannot_say():
    train, validation, test = (marked_tokens(n, i) for i, n in enumerate((320, 80, 120)))
    found = probe(train, validation, test)
    assert (found.test.argmax(1) == test[1]).mean() > 0.95
    assert found.validation_accuracy > 0.95
    means = [part[0][:, 0].astype(float).mean(1) for part in (train, validation, test)]
    mean = linear_probe(means[0], train[1], means[1], validation[1], means[2])
    assert (mean.predictions == test[1]).mean() < 0.65


def test_a_clips_score_is_the_mean_over_its_views():
    train, validation, (tokens, _) = (marked_tokens(n, i) for i, n in enumerate((64, 32, 30)))
    views = tokens.reshape(10, 3, 8, 16)
    short = SETTINGS.model_copy(update={"epochs": 2})
    single = probe(train, validation, (tokens, None), settings=short).test
    many = probe(train, validation, (views, None), settings=short).test
    np.testing.assert_allclose(many, single.reshape(10, 3, 2).mean(1), atol=1e-6)
    np.testing.assert_allclose(many.sum(1), 1, atol=1e-6)


def test_the_seed_alone_decides(tmp_path):
    train, validation, test = (marked_tokens(n, i) for i, n in enumerate((48, 24, 24)))
    short = SETTINGS.model_copy(update={"epochs": 2})
    state = torch.get_rng_state()
    first = probe(train, validation, test, settings=short)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = probe(train, validation, test, settings=short)
    assert (first.test == again.test).all()
    assert (probe(train, validation, test, seed=1, settings=short).test != first.test).any()

    # from a file, and of some rows only
    stored = np.memmap(tmp_path / "tokens", np.float16, "w+", shape=(96, 1, 8, 16))
    rows = np.arange(1, 96, 2)
    stored[rows] = train[0]
    found = attentive_probe(
        Tokens(values=stored, rows=rows), train[1], everything(validation[0]), validation[1],
        everything(test[0]), num_classes=2, settings=short, seed=0, device=CPU,
    )  # fmt: skip
    assert (found.test == first.test).all()


def test_heads_must_divide_the_width():
    with pytest.raises(UsageError, match=r"attentive\.heads is 5, .* width of 16"):
        probe(*(marked_tokens(8, i) for i in range(3)), settings=AttentiveConfig(heads=5))


def test_one_class_is_nothing_to_learn():
    tokens, labels = marked_tokens(8, 0)
    with pytest.raises(UsageError, match="at least two classes"):
        probe((tokens, 0 * labels), (tokens, labels), (tokens, labels))
