"""The one way in: whatever a user names (folder, file, Hub id) becomes a checkpoint and then a model. Headers only."""
