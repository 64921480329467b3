"""Calibration data as people have them: texts, chats and token ids in files and data sets, cut into batches."""
