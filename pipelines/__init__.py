"""Compositions of stages. Import them as `kdhiera.pipelines`."""

if __name__ != "kdhiera.pipelines":
    raise ImportError("import kdhiera.pipelines, not pipelines")
