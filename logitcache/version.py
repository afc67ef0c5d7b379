"""The version that manifests and packages carry."""

__version__ = "0.1.0"
