"""Curation: manifests of video ids and times become verdicts and shards. `pipeline` has the stages in order."""
