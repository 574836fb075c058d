"""Containers: what an image becomes when it runs. (Map of the package below.)"""
