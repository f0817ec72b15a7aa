"""A teacher of the user's own that breaks what `Teacher` promises, in one named way."""

from kdhiera.teachers.base import TeacherOutput, state_sha256


class Unchecked(TeacherOutput):
    """An output as a user's process takes it: tests check types, and would refuse it first."""

    def __init__(self, *, features, scores):
        self.__dict__.update(features=features, scores=scores)


class Broken:
    def __init__(self, grid, fault):
        self.identity = {"kind": "module", "model": "broken"}
        self.weights_sha256 = state_sha256({})
        self.grid = grid
        self.fault = fault

    def check(self, layers, score_source):
        pass

    def __call__(self, clips, layers, score_source):
        b, (t, h, w) = len(clips), self.grid.tokens
        tokens = clips.float().reshape(b, t, 2, h, 16, w, 16, 3).mean((2, 4, 6)) / 255
        scores = (tokens.mean(-1).flatten(2)).softmax(-1).reshape(b, t, h, w)
        match self.fault:
            case "output":
                return dict.fromkeys(layers, tokens)
            case "layer":
                return TeacherOutput(features={"first": tokens}, scores=scores)
            case "grid":
                tokens = tokens[:, :, :-1]
            case "flat":
                tokens = tokens.flatten(1, 3)
            case "batch":
                tokens = tokens[:1]
            case "dtype":
                tokens = tokens.int()
            case "numpy":
                tokens = tokens.numpy()
            case "device":
                tokens = tokens.to("meta")
            case "gradient":
                tokens.requires_grad_()
            case "crash":
                raise ValueError("two\nlines")
            case "no scores":
                scores = None
            case "units":
                scores = scores[:, :, ::2, ::2]
            case "whole numbers":
                scores = scores.long()
            case "logits":
                scores = scores.log()
            case "sums":
                scores = scores * h * w
            case "signed":  # as differences are: nothing on black clips
                scores = scores + tokens[..., 0] - tokens[..., 0].mean((2, 3), keepdim=True)
        return Unchecked(
            features=dict.fromkeys(layers, tokens), scores=scores if score_source else None
        )


def build(*, grid, device, dtype, fault=""):
    return 7 if fault == "teacher" else Broken(grid, fault)
