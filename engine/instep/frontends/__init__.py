"""Front ends: each decodes messages to `streaming.api.Frames` and implements `Origin`."""
