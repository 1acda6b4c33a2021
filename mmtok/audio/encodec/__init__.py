"""EnCodec (https://arxiv.org/abs/2210.13438) with the published weights: quicker, in constant memory, and as a stream.

24 kHz mono: plain codes. 48 kHz stereo: one-second windows, each divided by its loudness, so that the codes alone do
not hold the sound: :class:`EncodecCodes` carries the scales and the length too.

Names and shapes of the weights are the ``encodec`` package's; the network that runs is mmtok's own. What is returned
depends on the arguments alone: the bandwidth is no hidden state, rows of a batch are encoded one by one, sounds of
every length come back exactly as long. The padding at the end of a sound is the package's, a reflection, not silence.
"""

from mmtok.audio.encodec.codec import Encodec as Encodec
from mmtok.audio.encodec.codec import EncodecConfig as EncodecConfig
from mmtok.audio.encodec.windows import EncodecCodes as EncodecCodes
