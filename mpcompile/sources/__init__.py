"""Where models come from: timm, functions, folders of transformers and timm, the Hugging Face hub, exported programs.

:func:`mpcompile.sources.loading.load_model` decides by the name which of them is meant; one module per kind loads it.
"""
