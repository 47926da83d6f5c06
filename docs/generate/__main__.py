"""Write every generated part of the documents: `python -m docs.generate`."""

from docs.generate import pages, with_parts

if __name__ == "__main__":
    for page in pages():
        before = page.read_text()
        if (after := with_parts(before)) != before:
            page.write_text(after)
            print(f"wrote {page}")
