#!/usr/bin/env python3
"""Prints the prose of HTML files, a paragraph a line with blank lines between: filler for `winnow niah`.

Kept are <p> elements of at least 120 ASCII characters that end a sentence and are letters and spaces for 92 %; each
once. The needle figures in docs/quality.md used this text:

    apt-get download harden-doc freedombox-doc-en gimp-help-en aptitude-doc-en
    for d in *.deb; do dpkg -x "$d" unpacked; done
    bench/quality/html_prose.py unpacked/usr/share/doc/harden-doc/html/en-US/*.html \\
        unpacked/usr/share/freedombox/manual/en/*.part.html unpacked/usr/share/gimp/*/help/en/*.html \\
        unpacked/usr/share/doc/aptitude/html/en/*.html > filler.txt
"""

import html.parser
import re
import sys


class Paragraphs(html.parser.HTMLParser):
  """Collects the text of <p> elements, without what is preformatted or not shown."""

  HIDDEN = ("pre", "script", "style")

  def __init__(self):
    super().__init__()
    self.found = []
    self._text = None
    self._hidden = 0

  def handle_starttag(self, tag, attrs):
    if tag == "p":
      self._text = ""
    elif tag in self.HIDDEN:
      self._hidden += 1

  def handle_endtag(self, tag):
    if tag in self.HIDDEN:
      self._hidden = max(0, self._hidden - 1)
    elif tag == "p" and self._text is not None:
      self.found.append(re.sub(r"\s+", " ", self._text).strip())
      self._text = None

  def handle_data(self, data):
    if self._text is not None and not self._hidden:
      self._text += data


def is_prose(text: str) -> bool:
  letters = sum(c.isalpha() or c == " " for c in text)
  return len(text) >= 120 and text.isascii() and text[-1] in ".:" and letters >= 0.92 * len(text)


def main(paths: list[str]) -> int:
  if not paths or paths[0] in ("-h", "--help"):
    print(__doc__)
    return 0 if paths else 2
  seen = {}
  for path in paths:
    parser = Paragraphs()
    with open(path, encoding="utf-8", errors="ignore") as file:
      parser.feed(file.read())
    seen.update((text, None) for text in parser.found if is_prose(text))
  print("\n\n".join(seen))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
