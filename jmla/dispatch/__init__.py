"""How a config becomes a plan: choices, requirements, refusals, and how they are worded."""
