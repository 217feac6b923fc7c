"""The virtio device without a guest: its parts, and all of it behind a real socket."""
