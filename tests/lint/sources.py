"""Reading C++ just well enough for the rules: comments and strings blanked, functions with their extents."""

import re

_TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"([^()\\ ]{0,16})\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\'',
    re.DOTALL,
)
_NOT_A_FUNCTION = re.compile(r"\b(if|for|while|switch|catch|namespace|class|struct|union|enum|concept)\b|=\s*$|^\s*$")


def blank(text):
    """The text with comments and literals replaced by spaces; line numbers and the quotes of #include stay."""

    def spaces(match):
        piece = match.group(0)
        line_start = text.rfind("\n", 0, match.start()) + 1
        if piece.startswith('"') and text[line_start : match.start()].lstrip().startswith("#"):
            return piece
        return re.sub(r"[^\n]", " ", piece)

    return _TOKENS.sub(spaces, text)


def includes(text):
    """(line, how, name) of each #include; how is '<' or '"'."""
    for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', blank(text), re.MULTILINE):
        yield line_of(text, match.start()), match.group(1), match.group(2)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def functions(text):
    """(first line, number of lines, head) of each outermost function or TEST_CASE body, its head included."""
    code = re.sub(r"^[ \t]*#.*(?:\\\n.*)*", lambda m: re.sub(r"[^\n]", " ", m.group(0)), blank(text), flags=re.MULTILINE)
    start = 0  # of what may be the head of a body
    inside = []  # for each open brace: the head's position where it opened a function, else None
    parentheses = 0
    for position, character in enumerate(code):
        if character == "(":
            parentheses += 1
        elif character == ")":
            parentheses -= 1
        elif character == "{" and (parentheses > 0 or any(head is not None for head in inside)):
            inside.append(None)
        elif character == "{":
            head = code[start:position]
            opens = "(" in head and not _NOT_A_FUNCTION.search(re.sub(r"<[^<>]*>|\(.*\)", "", head, flags=re.DOTALL))
            inside.append(start if opens else None)
            start = position + 1
        elif character == "}" and inside:
            head_start = inside.pop()
            if head_start is not None:
                head = code[head_start:position].lstrip()
                first = line_of(code, position - len(head))
                yield first, line_of(code, position) - first + 1, head.split("{")[0].strip()
            if parentheses == 0 and not any(head is not None for head in inside):
                start = position + 1
        elif character == ";" and parentheses == 0 and not any(head is not None for head in inside):
            start = position + 1
        if character == "}" and parentheses < 0:
            parentheses = 0
