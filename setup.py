"""Lets tools that still call setup.py work; everything is in setup.cfg."""

from setuptools import setup

setup()
