"""Performance measurements of forgetrace against plain references: ``make bench``; no part of the package."""
