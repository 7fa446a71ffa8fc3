"""Corrigible."""
