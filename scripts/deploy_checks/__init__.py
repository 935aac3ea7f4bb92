"""The checks behind check_deploy.py: one module for each part of the deployment, `site` for what they share,
`faults` for the proof that each check can fail."""
