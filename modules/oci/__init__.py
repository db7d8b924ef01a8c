"""OCI images and registries: references, building, pushing, pulling, the content store."""
