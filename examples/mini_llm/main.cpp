// mini_llm: a Llama-architecture generator that verifies drafted tokens over a draft-guided selection of the cache.
// Text goes to stdout, everything else to stderr. Exit code 1: something given was wrong; the message says what.
#include <clocale>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include "commands/commands.hpp"
#include "commands/option_values.hpp"
#include "specattn/config.hpp"

int main(int argc, char** argv) {
  std::setlocale(LC_NUMERIC, "C");
  CLI::App app{
      "mini_llm: text from Llama-family models, with speculative decoding whose verification reads only\n"
      "the keys and values that the draft's attention points to (approximate; --guide none is exact)"};
  app.require_subcommand(0, 1);
  app.set_version_flag("--version", "mini_llm " + std::to_string(SPECATTN_VERSION_MAJOR) + "." +
                                        std::to_string(SPECATTN_VERSION_MINOR) + "." +
                                        std::to_string(SPECATTN_VERSION_PATCH));
  mini_llm::add_generate_command(app);
  mini_llm::add_calibrate_command(app);
  mini_llm::add_perplexity_command(app);
  mini_llm::add_bench_command(app);
  try {
    std::vector<std::string> arguments = mini_llm::plain_arguments(argc, argv);
    // Without a subcommand the main job runs, so that the program works with no arguments at all.
    if (arguments.size() < 2) arguments = {"mini_llm", "generate"};
    std::vector<const char*> pointers;
    for (const std::string& argument : arguments) pointers.push_back(argument.c_str());
    app.parse(static_cast<int>(pointers.size()), pointers.data());
    if (app.get_subcommands().empty()) std::cout << app.help();
    std::cout.flush();
    if (!std::cout) {
      std::cerr << "mini_llm: standard output could not be written\n";
      return 1;
    }
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 1;
  } catch (const std::bad_alloc&) {
    std::cerr << "mini_llm: out of memory; a smaller --ctx-size needs less\n";
  } catch (const std::exception& error) {
    std::cerr << "mini_llm: " << error.what() << '\n';
  }
  return 1;
}
