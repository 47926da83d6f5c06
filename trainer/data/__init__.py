"""From documents to batches: sources -> encoding -> packing -> order. Each file is one of these."""
