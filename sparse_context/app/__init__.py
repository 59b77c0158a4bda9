"""The web app: references in, the kept tokens drawn over them at once, then dense beside sparse.

    scene.py      what is on the screen, and what it comes to as a request
    sessions.py   what the server holds of each open page, and the work that the page has begun
    drawing.py    overlays, the comparison and the grid as HTML, with every picture inside of it
    layout.py     the page; controls.py makes those of its controls that say what the scene is
    page.py       what happens when they are used; references.py and answers.py do it
    serve.py      the address, the folder of uploads, and the end

Only `page.py` and what it uses import Gradio, and only when the app starts.
"""
