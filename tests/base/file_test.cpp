// Files: ranges, mappings, and writing that never shows half a file.
#include "base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "support/kit.h"

namespace caravan {
namespace {

using testing::TemporaryDirectory;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(File, ReadsBackWhatWasWritten) {
  const TemporaryDirectory folder;
  const auto path = folder.path() / "a.bin";
  write_file_atomically(path, bytes_of("hello world"));
  EXPECT_EQ(read_text_file(path), "hello world");
  write_file_atomically(path, bytes_of("shorter"));
  EXPECT_EQ(read_text_file(path), "shorter") << "an old file is replaced";
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "no temporary file is left";
}

TEST(InputFile, ReadsRangesAndNamesTheEnd) {
  const TemporaryDirectory folder;
  const auto path = folder.path() / "a.bin";
  write_file_atomically(path, bytes_of("0123456789"));
  const InputFile file(path);
  EXPECT_EQ(file.size(), 10U);
  std::array<std::byte, 4> part;
  file.read_at(3, part);
  EXPECT_EQ(static_cast<char>(part[0]), '3');
  try {
    file.read_at(8, part);
    FAIL() << "read past the end";
  } catch (const FormatError& error) {
    EXPECT_EQ(error.what(), path.string() + ": ends at byte 10, 2 more bytes were expected");
  }
}

TEST(InputFile, SaysWhatCannotBeOpened) {
  const TemporaryDirectory folder;
  EXPECT_THROW(InputFile(folder.path() / "absent"), SystemError);
  EXPECT_THROW(InputFile{folder.path()}, SystemError) << "a folder is not a file";
  EXPECT_THROW(read_file(folder.path() / "absent"), SystemError);
  EXPECT_THROW(write_file_atomically(folder.path() / "no" / "folder", {}), SystemError);
}

TEST(MappedFile, ShowsTheWholeFileOrItsBeginning) {
  const TemporaryDirectory folder;
  const auto path = folder.path() / "a.bin", empty = folder.path() / "empty";
  write_file_atomically(path, bytes_of("0123456789"));
  write_file_atomically(empty, {});
  EXPECT_EQ(MappedFile(path).bytes().size(), 10U);
  EXPECT_EQ(static_cast<char>(MappedFile(path).bytes()[9]), '9');
  EXPECT_EQ(MappedFile(path, 4).bytes().size(), 4U);
  EXPECT_TRUE(MappedFile(empty).bytes().empty());
}

TEST(OutputFile, AppearsOnlyWithCommit) {
  const TemporaryDirectory folder;
  const auto path = folder.path() / "a.bin";
  {
    OutputFile file(path);
    file.write_at(0, bytes_of("lost"));
    EXPECT_FALSE(std::filesystem::exists(path));
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  OutputFile file(path);
  file.write_at(4, bytes_of("cd"));
  file.write_at(0, bytes_of("ab"));
  file.commit();
  EXPECT_EQ(read_text_file(path), std::string("ab\0\0cd", 6));
}

}  // namespace
}  // namespace caravan
