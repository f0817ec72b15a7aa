from pathlib import Path

import pytest
import yaml

from kdhiera.config import dump, load
from kdhiera.errors import UsageError
from kdhiera.masking import Strategy

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [*sorted(FOLDER.glob("*.yaml")), FOLDER / "study" / "base.yaml"]
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_comes_back(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_layer_weights_are_by_name() -> None:
    given = load(DEMO, ["objective.layer_weights.image={6: 0.5, 10: 2}"]).objective
    dotted = load(
        DEMO, ["objective.layer_weights.image.6=0.5", "objective.layer_weights.image.10=2"]
    ).objective
    assert given == dotted
    assert given.layer_weights == {"image": {"6": 0.5, "10": 2.0}}


def test_overrides_are_yaml_at_dotted_keys() -> None:
    config = load(
        DEMO,
        [
            "train.epochs=7",
            "masks.strategies=[random, tube]",
            "objective.ratio=0.9",
            "objective.strategy=tube",
            "data.shards=only.tar",
            "teachers.image.layers=[12]",
        ],
    )
    assert config.train.epochs == 7
    assert [e.strategy for e in config.masks.strategies] == [Strategy.RANDOM, Strategy.TUBE]
    assert [s.ratio for s in config.mask_schedule.phases] == [0.9]
    assert config.data.shards == ("only.tar",)
    assert config.objective_layers["image"] == ("12",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "unknown key `train.epoch`; did you mean `train.epochs`"),
        ("teachers.image.layer=[3]", "did you mean `teachers.image.layers`"),
        ("trian.epochs=3", "did you mean `train`"),
        ("zzz=1", "valid here: name, run_dir"),
        ("train.epochs=many", "`train.epochs`: .*integer.*got 'many'"),
        ("train.epochs=0", "`train.epochs`: .*greater than or equal to 1, got 0"),
        ("masks.ratio=1.0", "`masks.ratio`"),
        ("clip.height=100", "clip.height must be a multiple of 32 px .*use 96 or 128"),
        ("clip.num_frames=7", "clip.num_frames must be even"),
        ("scores.teacher=imago", "scores.teacher names `imago`, but the teachers are: image"),
        ("objective.teachers=[audio]", "objective.teachers names `audio`"),
        ("objective.layers={image: [7]}", r"some of teachers.image.layers, \['6', '8', '10'\], in"),
        ("objective.layers={image: [12, 6]}", r"in that order, got \['12', '6'\]"),
        ("objective.layers={image: [12, 12]}", r"in that order, got \['12', '12'\]"),
        ("objective.layers.image=12", "`objective.layers.image`: Input should be a list, got 12"),
        ("teachers.image.layers=[9, 6]", "teachers.image.layers must ascend without repeats"),
        ("teachers.image.layers=['06', 9]", "teachers.image.layers names '06': write 6"),
        ("teachers.image.layers=[norm, 6]", "`norm` last"),
        ("student.taps={image: []}", "taps of image: name one for every layer"),
        ("train={use_gpu: true, device: cpu}", "use_gpu gives workers GPUs, but device is cpu"),
        ("train={num_workers: 2, device: cuda}", "give num_workers GPUs with use_gpu: true"),
        ("train.lr=.inf", "`train.lr`: Input should be a finite number, got inf"),
        ("teachers.image.weight=.inf", "`teachers.image.weight`: Input should be a finite number"),
        ("objective.layer_weights={imago: {6: 1}}", "objective.layer_weights names `imago`"),
        ("objective.layer_weights={image: {7: 1}}", r"image weighs \['7'\], but the layers of im"),
        ("objective.layer_weights={image: {6: 0, 8: 0, 10: 0}}", "leaves no layer a weight"),
        ("objective.layer_weights.image.6=-1", "`objective.layer_weights.image.6`: .* got -1"),
        (
            "objective.ratio=1.5",
            r"yaml: `objective.ratio.0`: Input should be less than 1, got 1.5$",
        ),
        ("objective.ratio=[]", "`objective.ratio`: name at least one ratio"),
        ("objective.teacher_drop=1.5", "`objective.teacher_drop`"),
        ("objective.loss=huber", "'cosine' or 'cosine_smooth_l1', got 'huber'"),
        ("student.head=deep", "'linear' or 'mlp', got 'deep'"),
        ("teachers.image.kind=hub", "`teachers.image.kind`"),
        ("teachers.image.model=null", "kind timm needs `model`"),
        ("teachers.image.factory=a:b", "a teacher of kind timm has no use for `factory`"),
        ("teachers.image={kind: transformers, layers: [1]}", "needs `model` or `weights`"),
        ("teachers.image={kind: hog, weights: x}", "kind hog has no use for `weights`"),
        ("teachers.image.compile=reduce-overhead", "`teachers.image.compile"),
        ("teachers.image.std=[1, 0, 1]", "std must be positive"),
        ("teachers.image.mean=[1, 1]", "`teachers.image.mean"),
        ("scores.source=attention", "`scores.source`: .*'received_attention'"),
        ("scores.heads=[-1]", "`scores.heads.0`: .*greater than or equal to 0"),
        ("scores.heads=[]", "`scores.heads`"),
        ("scores={teacher: image, source: uniform, heads: [1]}", "scores.heads has no effect"),
        ("scores={teacher: image, source: feature_norm, heads: [1]}", "heads has no effect"),
        ("scores={teacher: image, source: uniform, layer: 3}", "scores.layer has no effect"),
        ("teachers.image=null", "teachers.image"),
        ("views.crop_scale=[1.0, 0.5]", "crop_scale must be 0 < low <= high"),
        ("masks.strategies=[]", "masks.strategies"),
        ("noequals", "must read key.sub=value"),
        ("evaluate.methods=[nope]", r"or 'finetune', got 'nope'$"),
        ("run_dir=s3://bucket/run", "`run_dir`: must be a folder on this machine or a mounted one"),
        ("teachers.image.weights=https://me:hush@host/w", "weights: https://host/w was given with"),
        ("student.init=https://me:hush@host/w", "student.init: https://host/w was given with"),
        ("name.sub=3", "name is a value, not a section"),
        ("train.epochs=[", "not valid YAML"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(DEMO, [override])
    assert "\n" not in str(caught.value)


def test_someone_must_teach() -> None:
    silent = ["teachers.image.weight=0", "objective.teachers=[image]"]
    with pytest.raises(UsageError, match="all teachers of the objective have weight 0"):
        load(DEMO, silent)
    assert load(DEMO, silent[:1]).teachers["image"].weight == 0  # measured, while video teaches


def test_teachers_and_scores_say_more_when_asked() -> None:
    config = load(
        DEMO,
        [
            "scores={teacher: image, source: received_attention, layer: 9, heads: [3, 0, 3]}",
            "teachers.video={kind: pixels}",
            "teachers.image.compile=true",
        ],
    )
    assert (config.scores.layer, config.scores.heads) == ("9", (0, 3))
    assert config.teachers["video"].layers == ("patch",)
    assert config.teachers["video"].precision == "fp32"
    assert config.teachers["image"].compile is True


def test_wrong_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config file at"):
        load(tmp_path / "none.yaml")
    path = tmp_path / "x.yaml"
    for content, words in (("a: [", "not valid YAML"), ("- 1", "must hold a mapping")):
        path.write_text(content)
        with pytest.raises(UsageError, match=words):
            load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid YAML"):
        load(path)
    path.write_text(yaml.safe_dump({"name": "x"}))
    with pytest.raises(UsageError, match="`data` is required"):
        load(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.methods=[]", "evaluate.methods"),
        ("evaluate.methods=[knn, svm]", "evaluate.methods.1"),
        ("evaluate.methods=[knn, knn]", "name each once"),
        ("evaluate.seeds=[0, 0]", "name each once"),
        ("evaluate.seeds=[-1]", "seeds must be 0 or more"),
        ("evaluate.seed=1", "seeds"),
        ("evaluate.labels_per_class=[0]", "start at 1"),
        ("evaluate.test_crops=2", "evaluate.test_crops"),
        ("evaluate.q_pool=1", "evaluate.q_pool"),
        ("evaluate.attentive.lrs=[0.0]", "above 0"),
        ("evaluate.finetune.crop_scale=[0.9, 0.5]", "crop_scale must be"),
        ("evaluate.finetune={repeats: 8, batch_size: 4}", "8 repeats of a clip do not fit"),
        ("evaluate.finetune.layer_decay=0", "evaluate.finetune.layer_decay"),
    ],
)
def test_what_evaluation_cannot_do_is_refused(override: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("configs/demo.yaml", [override])
    assert words in str(caught.value)


def test_one_value_stands_for_a_list_of_one() -> None:
    config = load(
        "configs/demo.yaml",
        ["evaluate.methods=finetune", "evaluate.labels_per_class=5", "evaluate.seeds=3"],
    )
    assert config.evaluate is not None
    found = (config.evaluate.methods, config.evaluate.labels_per_class, config.evaluate.seeds)
    assert found == (("finetune",), (5,), (3,))
