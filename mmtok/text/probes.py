"""The texts on which an engine must give the ids of ``tokenizers`` before it is used.

``texts_for`` -- all of them for one vocabulary: prose in many scripts, literals, fuzz, and the vocabulary's own tokens
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

# Article 1 of the Universal Declaration of Human Rights, or a sentence of our own.
PROSE = (
    "All human beings are born free and equal in dignity and rights. They're endowed with reason; it's 1948, isn't it?",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits, n’est-ce pas ? L'été coûte 1 234,50 €.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straßengrößenänderungsverfügung – „so“.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Mañana será otro día, señor!",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Wszyscy ludzie rodzą się wolni i równi.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti. Minden emberi lény szabadon születik.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Kaikki ihmiset syntyvät vapaina.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Всі люди народжуються вільними. Ћирилица.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։ ყველა ადამიანი იბადება თავისუფალი და თანასწორი.",
    "كل الناس يولدون أحرارًا متساوين في الكرامة والحقوق، عام ١٩٤٨. تمام افراد بشر آزاد به دنیا می‌آیند؛ سب انسان آزاد",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतंत्रता और समानता प्राप्त है। १२३४",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা নিয়ে জন্মগ্রহণ করে। ਸਾਰੇ ਮਨੁੱਖ ਆਜ਼ਾਦ ਹਨ। બધા માનવો સ્વતંત્ર છે. ସମସ୍ତ ମନୁଷ୍ୟ",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர். మనుషులందరూ స్వేచ్ఛగా జన్మించారు. ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರು. മനുഷ്യരെല്ലാവരും",
    "සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත. มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน ມະນຸດເກີດມາມີສິດເສລີພາບ មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသည်။ འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ། ሰዎች ሁሉ ነጻ ሆነው ተወልደዋል። ᠬᠦᠮᠦᠨ",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。２０２６年１月。人人生而自由，在尊嚴和權利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。ｶﾀｶﾅ「カギ」ー々",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. \u1112\u1161\u11ab\u1100\u1173\u11af",
    'def encode(self, texts: list[str]) -> None:\n\treturn [f"{x!r}" for x in texts]  # 0x1F, 3.14e-10, a_b__c\r\n',
    '<p class="x">&nbsp;https://example.org/a?b=c&d=%20#e</p>\n\n```c\nint main(void) { return 0; }\n```',
)
LITERALS = (
    "", " ", "  ", "\n", "\r", "\r\n", "\t", "\n\n \n", " \n", "\n ", "  x", "x  ", "'s", "'S 'LL 'll'RE're 'ſ", "’s",
    " ".join(f"{c}'ſ" for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéя"),
    "<|endoftext|>", "a<|endoftext|>b", "<|im_start|>user\nhi<|im_end|>", "<s></s><unk><pad>[CLS][SEP][MASK][UNK]",
    "<image></image><audio></audio><bos><eos>", "<0x0A><0x41>", "▁the▁ cow▁▁", "ĠtheĊĉ", "##ing @@ Ġ", "\x00", "a\x00b",
    "\ufeff\ufffe\uffff\ufffd", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\x1f\xa0\u1680\u2000\u200b\u202f\u3000\u180e",
    "e\u0301e\u0301\u0301 n\u0303 \u0301 a\u20dd \u0345", "👨‍👩‍👧🇫🇷🏳️‍🌈👍🏽🐄🐄 ☃️ ⚡",
    "\U0010ffff\U00010000\ud7ff\ue000𝒜𝟙𐍈𠜎", "\u202e\u200f\u061c",
    "½²³¹①Ⅷ٣३५๗𝟘 1234567890 12 1٣३", "ǅ ʰ ª º ˈ ꙳ ﬁ ẞ İ ı K Å", "...!!! ?! -- — … «» ~~\n!!\r\n ?\n\n",
    " " * 300, "\n" * 300, "\r\n" * 150, "\t" * 300, "a" * 700, "1" * 301, "." * 300, "🐄" * 100, "e\u0301" * 200,
    "語" * 200, " a" * 100, "\xa0" * 100, " \n" * 100, "'" * 50 + "s" * 50, "\U000e0041" * 30,
)  # fmt: skip


@cache
def fuzz() -> tuple[str, ...]:
    """Seeded nonsense: pieces of the prose and the literals in any order, and code points from all of Unicode."""
    rng = random.Random(20260101)
    words = [w for text in PROSE for w in text.split(" ")]
    letters = sorted(set("".join(PROSE)) | set("".join(LITERALS)))
    out = []
    for _ in range(120):
        pool = rng.choice((words, letters, LITERALS[:33]))
        out.append("".join(rng.choice(pool) + rng.choice(("", "", " ", "  ", "\n", "'")) for _ in range(20)))
    for _ in range(120):
        top = rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x110000))
        points = (rng.randrange(top) for _ in range(24))
        out.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return tuple(out)


def texts_for(id_to_bytes: Sequence[bytes], tokens: int = 2048) -> list[str]:
    """The probes for a vocabulary; always the same for the same one.

    Args:
        id_to_bytes: the bytes of each id.
        tokens: at most so many of the vocabulary's own tokens, evenly over the ids, joined in a shuffled order.
    """
    ids = list(range(0, len(id_to_bytes), -(-len(id_to_bytes) // tokens)))
    random.Random(len(id_to_bytes)).shuffle(ids)
    own = [id_to_bytes[i].decode("utf-8", errors="ignore") for i in ids]
    joined = ["".join(own[i : i + 32]) for i in range(0, len(own), 32)]
    spaced = " ".join(own[:: max(1, len(own) // 512)])
    texts = [*PROSE, *LITERALS, *fuzz(), *joined, spaced]
    # A long text too: engines cut those into parts that run side by side.
    return [*texts, "".join(texts)]
