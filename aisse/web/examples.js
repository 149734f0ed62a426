/** Questions for a page that is empty. The simulator knows nothing: it is told its answers. */

const SKY = `Sunlight is a mix of all colours, and air scatters the short waves far more than the long ones. That is
**Rayleigh scattering**: its strength grows with the inverse fourth power of the wavelength.

| Colour | Wavelength | Scattered, red = 1 |
| --- | ---: | ---: |
| Violet | 400 nm | 9.4 |
| Blue | 450 nm | 5.9 |
| Green | 530 nm | 3.0 |
| Red | 700 nm | 1.0 |

So why is it not violet?

1. The sun sends less violet than blue.
2. Some of it is absorbed high up.
3. Our eyes are *less sensitive* to it.

> In the evening the light comes a longer way through the air. The blue is gone before it arrives, and red is left.
`;

const MERGE = `Walk through both lists at once, and take the smaller head each time:

\`\`\`python
from collections.abc import Iterator


def merge(left: list[int], right: list[int]) -> Iterator[int]:
    """Yield the items of two sorted lists in order."""
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            yield left[i]
            i += 1
        else:
            yield right[j]
            j += 1
    yield from left[i:]
    yield from right[j:]
\`\`\`

Each item is looked at once, so it takes \`O(n + m)\`. The standard library has it as
[\`heapq.merge\`](https://docs.python.org/3/library/heapq.html#heapq.merge), for any number of lists.
`;

const TALE = `The lamp had to be wound every four hours, and in forty years Edda had never been late. She counted the
turns aloud, for company: a hundred and twelve, and the weight hung under the roof again.

Out on the water a ship answered. It came every night at the same minute, said nothing but its name, and went on north.
She wrote the name into the book, under the hundreds of others that were the same.

Then, in the worst storm of the winter, the line broke. She wrote what she had heard, and left the rest free.

In the morning the voice was there again and went on in the middle of its word, as if nothing had been. She had only to
dip her pen.`;

const tale = Array.from({ length: 16 }, (_, night) => `### Night ${night + 1}\n\n${TALE}`).join("\n\n");

export const EXAMPLES = [
  { question: "Why is the sky blue?", script: `thinking_tokens=60 text='${SKY}'` },
  { question: "Merge two sorted lists in Python", script: `text='${MERGE}'` },
  { question: "Tell a long story of a lighthouse keeper", script: `pace=30 text='${tale}'` },
];
