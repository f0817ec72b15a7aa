"""The runnable stages: extract, distill, evaluate. Import them as `kdhiera.stages`."""

if __name__ != "kdhiera.stages":
    raise ImportError("import kdhiera.stages, not stages")
