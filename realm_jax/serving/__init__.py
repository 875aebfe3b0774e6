"""From requests to outputs: request, scheduler, engine."""
