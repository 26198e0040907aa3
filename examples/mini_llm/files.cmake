# mini_llm_files: what reads the files of a model directory, without the model itself.
# Needs nlohmann-json and pcre2-8, which cmake/mini_llm_libraries.cmake looks for, and of the library the 16-bit numbers.
if(TARGET mini_llm_files)
  return()
endif()
add_library(mini_llm_files STATIC
  ${CMAKE_CURRENT_LIST_DIR}/gguf_file.cpp
  ${CMAKE_CURRENT_LIST_DIR}/gguf_value.cpp
  ${CMAKE_CURRENT_LIST_DIR}/json_document.cpp
  ${CMAKE_CURRENT_LIST_DIR}/mapped_file.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/config_fields.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/gguf_model.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/model_config.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/model_files.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/safetensors.cpp
  ${CMAKE_CURRENT_LIST_DIR}/model/unread_weights.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/bpe.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/byte_alphabet.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/gguf_tokenizer.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/nfc.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/split_pattern.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/stream_decoder.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/token_finder.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/tokenizer.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/tokenizer_file.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/utf8.cpp
  ${CMAKE_CURRENT_LIST_DIR}/text/vocabulary.cpp)
target_compile_features(mini_llm_files PUBLIC cxx_std_20)
target_include_directories(mini_llm_files PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(mini_llm_files PUBLIC specattn::core nlohmann_json::nlohmann_json PRIVATE PkgConfig::PCRE2)
