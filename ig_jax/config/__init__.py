"""Run configs: parsed once, validated, frozen."""
