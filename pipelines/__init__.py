"""Sampling as diffusers pipelines; imported as diffalign.pipelines."""
