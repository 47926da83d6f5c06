"""How Sphinx builds the pages: `make docs`. What is generated is in the pages already, so they read on GitHub, too."""

project = "Limbeck"
author = "Limbeck contributors"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build", "generate", "examples"]
html_theme = "pydata_sphinx_theme"
html_title = "Limbeck"
html_theme_options = {"show_nav_level": 1, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
html_sidebars = {"**": ["sidebar-nav-bs"]}
html_show_sourcelink = False

myst_enable_extensions = ["smartquotes"]
myst_heading_anchors = 4  # as GitHub makes them
myst_fence_as_directive = ["mermaid"]
nitpicky = True
suppress_warnings = ["myst.header"]  # log.md begins as it likes
