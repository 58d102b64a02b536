"""`make demo`: Fleece's main job from beginning to end, on a real Linux guest, told in plain words."""
