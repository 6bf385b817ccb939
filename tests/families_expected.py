"""What is expected of each causal language model of transformers 5.24, text alone."""

VERSION = (5, 24)

SERVED = """
AfmoeForCausalLM Apertus1p5TextForCausalLM ApertusForCausalLM ArceeForCausalLM
AriaForConditionalGeneration AriaTextForCausalLM AyaVisionForConditionalGeneration BambaForCausalLM
BeamForCausalLM BertGenerationDecoder BertLMHeadModel BioGptForCausalLM BitNetForCausalLM
CTRLLMHeadModel CamembertForCausalLM ChameleonForConditionalGeneration CodeGenForCausalLM
Cohere2ForCausalLM Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration
CohereCompassForCausalLM CohereCompassForConditionalGeneration CohereForCausalLM
Cosmos3EdgeForConditionalGeneration Cosmos3OmniForConditionalGeneration CwmForCausalLM
Data2VecTextForCausalLM DbrxForCausalLM DeepseekOcr2ForConditionalGeneration
DeepseekVLForConditionalGeneration DeepseekVLHybridForConditionalGeneration Dots1ForCausalLM
ElectraForCausalLM Emu3ForCausalLM Emu3ForConditionalGeneration Ernie4_5ForCausalLM
Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration ErnieForCausalLM
EvollaForProteinText2Text Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration
ExaoneMoeForCausalLM FlexOlmoForCausalLM FlintForCausalLM FunAsrNanoForConditionalGeneration
FuyuForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM
Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration GemmaForCausalLM
Glm46VForConditionalGeneration Glm4ForCausalLM Glm4MoeForCausalLM Glm4vForConditionalGeneration
Glm4vMoeForConditionalGeneration GlmAsrForConditionalGeneration GlmForCausalLM
GlmOcrForConditionalGeneration GotOcr2ForConditionalGeneration GptOssForCausalLM
Granite4VisionForConditionalGeneration GraniteDoclingForConditionalGeneration GraniteForCausalLM
GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
GraniteMoeSharedForCausalLM GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
GraniteSpeechPlusForConditionalGeneration HYV3ForCausalLM HeliumForCausalLM
HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration
HyperCLOVAXForCausalLM HyperCLOVAXVisionV2ForConditionalGeneration Idefics2ForConditionalGeneration
Idefics3ForConditionalGeneration InternVLForConditionalGeneration Jais2ForCausalLM JambaForCausalLM
JanusForConditionalGeneration Kolibri1ForCausalLM Kosmos2_5ForConditionalGeneration
LagunaForCausalLM LaraMiniForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
Lfm2VlForConditionalGeneration Lfm3ForCausalLM Lfm3VlForConditionalGeneration
LightOnOcrForConditionalGeneration LlamaForCausalLM LlavaForConditionalGeneration
LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration
LlavaOnevisionForConditionalGeneration MellumForCausalLM MiMoV2FlashForCausalLM
MiniCPMOcrForConditionalGeneration MiniCPMV4_6ForConditionalGeneration
MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM Ministral3ForCausalLM MinistralForCausalLM
Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM ModernBertDecoderForCausalLM
Molmo2ForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration
MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration NanoChatForCausalLM
NemotronForCausalLM NemotronHForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM OmniASRForConditionalGeneration
Ovis2ForConditionalGeneration PaddleOCRVLForConditionalGeneration PersimmonForCausalLM
Phi3ForCausalLM Phi4MultimodalForCausalLM PhiForCausalLM PhimoeForCausalLM
QianfanOCRForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2ForCausalLM
Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5OmniThinkerForConditionalGeneration
Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3ForCausalLM
Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeThinkerForConditionalGeneration
Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
RoCBertForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM SeedOssForCausalLM
SmolLM3ForCausalLM SmolVLMForConditionalGeneration SolarOpenForCausalLM StableLmForCausalLM
Starcoder2ForCausalLM Step3p7ForConditionalGeneration VaultGemmaForCausalLM
VibeVoiceAsrForConditionalGeneration VideoLlama3ForConditionalGeneration
VideoLlavaForConditionalGeneration VipLlavaForConditionalGeneration VoxtralForConditionalGeneration
XLMRobertaForCausalLM XLMRobertaXLForCausalLM XmodForCausalLM
"""

# what docs/architecture.md says is refused: (what the message says, who is refused so)
REFUSED = {
    "encoder-decoders": (
        r"is an encoder-decoder",
        """
        Florence2ForConditionalGeneration PPFormulaNetForConditionalGeneration
        Pix2StructForConditionalGeneration T5Gemma2ForConditionalGeneration
        UdopForConditionalGeneration VisionEncoderDecoderModel
        """,
    ),
    "models that do not generate text": (
        r"is not a causal language model",
        """
        PI0ForConditionalGeneration
        """,
    ),
    "models without attention": (
        r"has no attention layer",
        """
        FalconMambaForCausalLM Mamba2ForCausalLM MambaForCausalLM
        """,
    ),
    "attention outside transformers' registry": (
        r"does not go through transformers' attention registry",
        """
        BigBirdForCausalLM BlipForConditionalGeneration BloomForCausalLM BltForCausalLM
        CpmAntForCausalLM FalconForCausalLM GPTNeoForCausalLM GPTNeoXJapaneseForCausalLM
        GitForCausalLM HrmTextForCausalLM MegatronBertForCausalLM MptForCausalLM MvpForCausalLM
        OpenAIGPTLMHeadModel ProphetNetForCausalLM ReformerModelWithLMHead RemBertForCausalLM
        RoFormerForCausalLM RwkvForCausalLM TrOCRForCausalLM XGLMForCausalLM XLMWithLMHeadModel
        XLNetLMHeadModel xLSTMForCausalLM
        """,
    ),
    "caches of other things than are attended, such as compressed (MLA) ones": (
        r"such as a compressed form",
        """
        AXK1ForCausalLM BailingHybridForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM
        DiffLlamaForCausalLM Glm4MoeLiteForCausalLM IdeficsForVisionText2Text JetMoeForCausalLM
        KimiLinearForCausalLM Kimi_K25ForConditionalGeneration LongcatFlashForCausalLM
        MiniCPM3ForCausalLM Mistral4ForCausalLM MllamaForCausalLM MllamaForConditionalGeneration
        YoutuForCausalLM
        """,
    ),
    "keys shared between layers": (
        r"shares keys and values between layers",
        """
        Gemma3nForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration
        Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForCausalLM
        Gemma4UnifiedForConditionalGeneration MistralLarge4ForConditionalGeneration
        """,
    ),
    "indexed attention, and attention beside a state in one layer": (
        r"keeps its past in a .*Layer|DeepseekV4HCACache",
        """
        AXK2ForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM Dots3NoteForCausalLM
        FalconH1ForCausalLM Glm5NextForConditionalGeneration GlmMoeDsaForCausalLM HYV4ForCausalLM
        HYV4VLForConditionalGeneration Inkling2ForCausalLM Inkling2ForConditionalGeneration
        Inkling2LoopForCausalLM Inkling2LoopForConditionalGeneration InklingForCausalLM
        InklingForConditionalGeneration Qwen4ExpForCausalLM Qwen4ExpForConditionalGeneration
        UnlimitedOcrForConditionalGeneration Zamba2ForCausalLM ZambaForCausalLM ZayaForCausalLM
        """,
    ),
    "states kept outside the cache": (
        r"keeps a recurrent state in the model itself",
        """
        RecurrentGemmaForCausalLM
        """,
    ),
    "caches of a model's own kind": (
        r"keeps its past in a cache of its own kind",
        """
        MiniMaxForCausalLM
        """,
    ),
    "chunked attention": (
        r"has chunked attention layers",
        """
        Llama4ForCausalLM Llama4ForConditionalGeneration
        """,
    ),
    "attention that is told which blocks to see": (
        r"passes block_indices to its attention",
        """
        MiniMaxM3SparseForConditionalGeneration MiniMaxM3VLForCausalLM
        """,
    ),
    "attention that is not causal": (
        r"is not causal",
        """
        BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM
        MBartForCausalLM MarianForCausalLM MusicgenForCausalLM PLBartForCausalLM
        PaliGemmaForConditionalGeneration PegasusForCausalLM WhisperForCausalLM
        """,
    ),
}

# the same, known only when the model is called
REFUSED_WHEN_CALLED = {
    "masks that are more than causal, windowed and padded": (
        r"more than causal, windowed and padded",
        """
        DogeForCausalLM
        """,
    ),
    "masks that the model makes by itself": (
        r"attention mask that is already 4-D",
        """
        Kosmos2ForConditionalGeneration
        """,
    ),
    "windows in the cache alone and not in the mask": (
        r"shows tokens 0 to \d+, but its cache keeps",
        """
        MoshiForCausalLM
        """,
    ),
    "layers that the model adds to its cache": (
        r"cannot be copied by itself|without an attention call",
        """
        DoryForCausalLM
        """,
    ),
}

# what transformers itself says where it has no such model of small sizes, or takes no text alone
NOT_TRIED = {
    "Apertus1p5ForConditionalGeneration": "codebook_dim",
    "Blip2ForConditionalGeneration": "pixel_values",
    "InstructBlipForConditionalGeneration": "pixel_values",
    "InstructBlipVideoForConditionalGeneration": "pixel_values",
    "DiffusionGemmaForBlockDiffusion": "topk",
    "Dots3NoteForConditionalGeneration": "adapter_in_dim",
    "FastVlmForConditionalGeneration": "timm",
    "Gemma3nForConditionalGeneration": "timm",
    "PerceptionLMForConditionalGeneration": "timm",
    "Gemma4AssistantForCausalLM": "hidden_size_per_layer_input",
    "KyutaiSpeechToTextForConditionalGeneration": "NoneType",
    "MusicgenMelodyForCausalLM": "invalid for input of size",
    "Nemotron3_5TranscribeForConditionalGeneration": "audio_hidden_size",
    "NemotronH_Omni_Reasoning_V3": "video_temporal_patch_size",
    "Qwen2_5OmniForConditionalGeneration": "Chelsie is not available",
    "Qwen3OmniMoeForConditionalGeneration": "shared_expert_intermediate_size",
    "VoxtralRealtimeForConditionalGeneration": "input_features",
}

# modes that stock lacks for some of them: it refuses to crop states, and embeddings without tokens
MAY_FAIL_IN_STOCK = ("assisted", "prompt-lookup", "embeddings")

# the same of single classes
STOCK_FAILS = {"Kosmos2_5ForConditionalGeneration": ("by-hand", "by-hand-padded")}
