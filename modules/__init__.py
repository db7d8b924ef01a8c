"""Model images: the `model.json` contract, building, pushing, pulling and storing them."""
