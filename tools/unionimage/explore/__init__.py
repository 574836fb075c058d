"""Look inside an image: one page of HTML with its layers, their trees and what they waste.

cli/explore.py
    ├─ survey.py    image → plain data: layers, entries, kinds of change, wasted bytes
    ├─ page.py      that data + explorer.html → one file that needs no network
    └─ serve.py     the same page on loopback
"""
