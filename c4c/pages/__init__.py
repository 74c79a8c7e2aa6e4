"""What pages that are complete in themselves have in common: one file, no network, light and dark.

filling  fills a page's template, and keeps what is not the page's own from running; base.html, base.css and base.js are of all pages
charts   lines as SVG
"""
