"""The version that manifests and packages carry."""

__version__ = "0.1.0"
CREATED_BY = f"logitcache {__version__}"
"""What manifests and histories say of the version that wrote them."""
